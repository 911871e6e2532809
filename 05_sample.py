"""Chapter 5 · Sampling: let the model write, and look at what it thinks while it does.

The model gives a score to every token that could come next. Softmax turns the scores into probabilities, and
one token is drawn. It is appended, and the model is asked again. Always taking the likeliest token is dull and
tends to loop; drawing from all of them lets nonsense in. The filters in between are compromises, each a few lines:

    scores (V,) -> temperature -> top-k, top-p -> softmax -> draw
                   sharper, flatter   cut the unlikely tail

Run:    python 05_sample.py --prompt "def read"         goes on with a text
        python 05_sample.py --chat                      talks, after chapter 6
        python 05_sample.py --explain                   shows the five likeliest tokens each time
        python 05_sample.py --score 01_tokenizer.py     shows where a text surprises the model
        python 05_sample.py --heatmap out/attention.png --prompt "for name in names: print(name)"
Prints: the text as it is written, then how much of it is copied from the training data.
Source: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Carlini et al. 2021 (what models memorise).
"""
import codecs
import math
import sys
import time
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

chapter1, chapter2, chapter3 = map(import_module, ("01_tokenizer", "02_data", "03_model"))
CourseError, CHAT_START, CHAT_END = chapter1.CourseError, chapter1.CHAT_START, chapter1.CHAT_END

# Legend
#   V        vocabulary; logits (V,) are the scores of all tokens, before softmax
#   stream   one text being written; each has its own random generator
#   turn     one message of a chat: {"role": "user", "assistant" or "system", "content": text}
CHAT_TEMPERATURE = 0.2  # low: an answer should be right rather than surprising
CHAT_TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


@dataclass
class Config:
    model: str = ""  # folder to sample from, ours or any that chapter 3 opens (default: out/base, to chat out/chat)
    prompt: str = "def"  # text to go on from; do not end it with a space: most tokens begin with theirs
    prompt_file: str = ""  # read the prompt from this file
    max_tokens: int = 200  # tokens to write at most
    temperature: float | None = None  # below 1 sharper, above flatter, 0 the likeliest (default: 0.8, chat 0.2)
    top_k: int = 0  # draw among the k likeliest only (0: all)
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    stop: list[str] = field(default_factory=list)  # stop before any of these texts
    samples: int = 1  # texts to write at once, with seed, seed + 1, ...
    seed: int = 1  # of the draws
    cache: bool = True  # keep the keys and values of what was read; without, all of it is computed anew each time
    chat: bool = False  # talk: /reset forgets, Ctrl-D ends
    system: str = ""  # instruction at the start of a chat
    explain: bool = False  # show the five likeliest tokens at each place, and the entropy (the surprise to expect)
    score: str = ""  # show where this text file surprises the model, and bits per byte
    heatmap: str = ""  # draw the attention over the prompt's tokens to this file
    heatmap_layers: list[int] = field(default_factory=list)  # layers to draw (default: first, middle, last)
    heatmap_heads: list[int] = field(default_factory=list)  # heads to draw (default: the first four)
    device: str = "cpu"  # cpu, cuda or mps
    out: str = "out"  # root folder of the course

    def __post_init__(self):
        limits = {"temperature": (0, 100), "top_k": (0, 10**9), "top_p": (0, 1), "samples": (1, 1000),
                  "max_tokens": (1, 10**9), "seed": (0, 10**18)}
        for name, (low, high) in limits.items():
            if not low <= (getattr(self, name) or 0) <= high:
                raise CourseError(f"--{name.replace('_', '-')} {getattr(self, name)} must be between {low} and {high}")
        if self.samples > 1 and (self.chat or self.explain):
            raise CourseError(f"--samples {self.samples}: --chat and --explain write one text at a time")


# ---- From scores to one token, from tokens to text -----------------------------------------------
def keep_top_k(logits, k):
    """Leave the k highest scores, set the others to minus infinity, which softmax makes 0."""
    best = logits.topk(min(k, len(logits)))
    return torch.full_like(logits, -math.inf).scatter(0, best.indices, best.values)


def keep_top_p(logits, p):
    """Leave the fewest likeliest tokens whose probabilities add up to p or more; at least one."""
    ordered, order = logits.softmax(-1).sort(descending=True)
    enough = ordered.cumsum(-1)[:-1] >= p                      # (V - 1,) have those before this one p already?
    return logits.index_fill(0, order[1:][enough], -math.inf)


def next_token(logits, config, generator=None):
    """Choose an id: a pure function of scores (V,), settings and the generator's state."""
    logits = logits.float().cpu()
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    for keep, limit, off in ((keep_top_k, config.top_k, 0), (keep_top_p, config.top_p, 1)):
        logits = logits if limit == off else keep(logits, limit)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


@torch.inference_mode()                                        # no gradients, and less bookkeeping than no_grad
def generate(model, prompts, config, ends=(), vocab=None, stopped=()):
    """Yield {stream: (new id, logits (V,))} step by step, for prompts (lists of ids) of equal length.

    Stream i draws with seed + i, whoever else is being written. It ends with an id in `ends` (which is yielded),
    after max_tokens, or when the caller puts i into the set `stopped`. Ids from `vocab` on, which only pad the
    model's table, are not drawn. A text that outgrows the context goes on by chapter 3's window_start.
    """
    texts, alive = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    generators = [torch.Generator().manual_seed(config.seed + i) for i in alive]
    device, cache, start = model.embed_tokens.weight.device, None, None
    while alive and len(texts[alive[0]]) < len(prompts[0]) + config.max_tokens:
        begin = chapter3.window_start(len(texts[alive[0]]), model.config.context)
        if cache is not None and begin == start:
            rows = [texts[i][-1:] for i in alive]                                  # the cache knows the others
        else:
            rows = [texts[i][begin:] for i in alive]
            rows = rows[:1] if all(row == rows[0] for row in rows) else rows       # an equal prompt is read once
            cache, start = chapter3.KVCache(model.config, len(rows), device) if config.cache else None, begin
        logits = model(torch.tensor(rows, device=device), cache=cache)[:, -1, :vocab].expand(len(alive), -1)   # (B, V)
        if cache and len(rows) < len(alive):
            cache.select([0] * len(alive))
        new = {i: (next_token(row, config, generators[i]), row) for i, row in zip(alive, logits)}
        for i, (token, _) in new.items():
            texts[i].append(token)
        yield new
        going = [row for row, i in enumerate(alive) if new[i][0] not in ends and i not in stopped]
        if cache and len(going) < len(alive):
            cache.select(going)
        alive = [alive[row] for row in going]


class TextStream:
    """Turn ids into text as they come. A part of a character, or of a stop text, is held back till it is whole."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops, self.ids, self.text, self.held, self.done = tokenizer, stops, [], "", "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids, last=False):
        """Return the text that is certain after `ids`; `last` lets go of what was held back."""
        self.ids += ids
        self.held += self.decoder.decode(self.tokenizer.decode_bytes(ids), last)
        cuts = [self.held.find(stop) for stop in self.stops if stop and stop in self.held]
        if cuts:
            self.held, self.done, last = self.held[:min(cuts)], True, True
        parts = [n for stop in self.stops for n in range(len(stop)) if self.held.endswith(stop[:n]) and not last]
        sure = len(self.held) - max(parts, default=0)          # the rest may be the beginning of a stop text
        text, self.held = self.held[:sure], self.held[sure:]
        self.text += text
        return text


# ---- Looking inside ------------------------------------------------------------------------------
def explain(logits, chosen, tokenizer):
    """Return a line: the token, the entropy in bits, and the five likeliest, before temperature and filters."""
    p = logits.float().softmax(-1)                             # (V,)
    entropy = torch.special.entr(p).sum() / math.log(2)        # entr is -p log p, and 0 where p is 0
    best = "  ".join(f"{p[i]:.2f} {tokenizer.decode([i])!r:10}" for i in p.topk(min(5, len(p))).indices.tolist())
    return f"{tokenizer.decode([chosen])!r:14} {entropy:5.2f} bits   {best}".rstrip()


@torch.inference_mode()
def attention_maps(model, ids):
    """Return the attention weights of every layer, (layers, H, T, T), for a list of ids."""
    maps = []

    def record(module, inputs):
        if isinstance(module, chapter3.Attention):
            q, k, _ = module.project(*inputs[:2])
            unit = torch.eye(q.shape[2], device=q.device).expand(*k.shape[:3], -1)     # (B, K, T, T) as values:
            maps.append(chapter3.attention(q, k, unit, "formula")[0])                  # their mean is the weights

    with torch.nn.modules.module.register_module_forward_pre_hook(record):             # before each forward
        model(torch.tensor([ids], device=model.embed_tokens.weight.device))
    return torch.stack(maps)


def draw_heatmap(model, tokenizer, ids, config):
    """Draw who looks at whom among the tokens of a prompt: a row per layer, a column per head."""
    L, H = model.config.layers, model.config.heads
    layers, heads = config.heatmap_layers or sorted({0, L // 2, L - 1}), config.heatmap_heads or range(min(4, H))
    if not (set(layers) <= set(range(L)) and set(heads) <= set(range(H)) and len(ids) <= 64):
        raise CourseError(f"--heatmap draws up to 64 tokens (here {len(ids)}), layers 0 to {L - 1}, heads 0 to {H - 1}")
    maps = attention_maps(model, ids).cpu().numpy()            # (layers, H, T, T)
    names, side = [repr(tokenizer.decode([i]))[1:-1].replace(" ", "·") for i in ids], max(2.4, 0.17 * len(ids))
    figure = Figure(figsize=(side * len(heads) + 2, side * len(layers) + 1), layout="constrained")
    axes = figure.subplots(len(layers), len(heads), sharex=True, sharey=True, squeeze=False)
    for axis, (layer, head) in zip(axes.flat, [(layer, head) for layer in layers for head in heads]):
        picture = axis.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1)
        axis.set_title(f"layer {layer}, head {head}", fontsize=9)
        axis.set_xticks(range(len(ids)), names, rotation=90, fontsize=8, parse_math=False)
        axis.set_yticks(range(len(ids)), names, fontsize=8, parse_math=False)
    figure.colorbar(picture, ax=axes, label="how much the token on the left looks at the one below", shrink=0.6)
    with chapter1.replacing(config.heatmap) as temporary:
        figure.savefig(temporary, dpi=110)
    print(f"drew {config.heatmap}")


@torch.inference_mode()
def score(model, tokenizer, text):
    """Return (bits per byte, [(piece of text, bits)]) of a text, read in blocks of the model's context."""
    marks = [i for i in (tokenizer.first, tokenizer.special_tokens.get(chapter1.END_OF_TEXT)) if i is not None]
    ids = marks[:1] + tokenizer.encode(text)                   # without a mark to start from, no first token
    T, bits, stream = model.config.context, [], TextStream(tokenizer)
    for start in range(0, len(ids) - 1, T):
        part = torch.tensor(ids[start:start + T + 1], device=model.embed_tokens.weight.device)
        log_p = model(part[None, :-1])[0].float().log_softmax(-1)                  # (T, V)
        bits += (-log_p.gather(1, part[1:, None])[:, 0] / math.log(2)).tolist()    # (T, V) -> (T,)
    pieces = [(stream.feed([i]), b) for i, b in zip(ids[1:], bits)]
    return sum(bits) / max(1, len(tokenizer.decode_bytes(ids[1:]))), pieces


def show_score(model, tokenizer, text):
    """Print a text with the bits that its tokens cost."""
    bits, pieces = score(model, tokenizer, text)
    shades, raised = (235, 18, 25, 94, 130, 166), str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    marked = [piece + f"{b:.0f}".translate(raised) if b >= 8 else piece for piece, b in pieces]
    colours = [shades[min(int(b / 2), 5)] for _, b in pieces]  # grey, blues, oranges: lighter costs more
    print(chapter1.show_tokens(marked, colours) if sys.stdout.isatty() else "".join(marked))
    print(f"{bits:.3f} bits per byte (raised: bits of the token before, where 8 or more; lighter colours: more bits)")


def memorisation(ids, tokens, part=1 << 22):
    """Return (longest run of ids that stands verbatim in tokens, share of ids in runs of 20 or more).

    A run is two tokens at least. Both become strings, a character per token, in which Python's `in` can search:
    most of 10^8 tokens have no neighbour in common with ids and shrink to gaps between the others.
    """
    ids, gap = np.asarray(ids, "<u4"), np.uint32(0x10FFFF)     # the last character that there is
    number = lambda some: (some[:-1] * 40503 + some[1:]) & 0xFFFF  # (n,) -> (n - 1,) of each pair, rarely shared

    def spell(some):
        some = np.append(gap, np.asarray(some, "<u4"))         # (n + 1,)
        hits = np.isin(number(some), number(ids))              # (n,) may tokens i and i + 1 be a pair in ids?
        near = np.append(hits, False) | np.append(False, hits)     # (n + 1,) is token i one of such a pair?
        kept = np.where(near, some, gap)[near | np.append(True, near[:-1])]
        return kept.tobytes().decode("utf-32-le", "surrogatepass")

    data = "".join(spell(tokens[i:i + part + len(ids)]) for i in range(0, len(tokens), part))
    mine, longest, covered, end = spell(ids)[1:], 1, set(), 0
    for start in range(len(mine)):
        end = max(end, start + 1)                              # a run ends no sooner than the one before it
        while end < len(mine) and mine[start:end + 1] in data:
            end += 1
        longest = max(longest, end - start)
        covered.update(range(start, end) if end - start >= 20 else ())
    return longest if longest > 1 else 0, len(covered) / max(1, len(ids))


# ---- Chat ----------------------------------------------------------------------------------------
def encode_chat(tokenizer, turns):
    """Return (ids, learnt) of a conversation in ChatML (CHAT_TEMPLATE); learnt marks the assistant's words and end."""
    start, end = tokenizer.special_tokens[CHAT_START], tokenizer.special_tokens[CHAT_END]
    newline, ids, learnt = tokenizer.encode("\n"), [], []
    for turn in turns:
        head = [start, *tokenizer.encode(turn["role"] + "\n")]
        said = [*tokenizer.encode(turn["content"].strip()), end]   # plain text: no user can type a special token
        ids += head + said + newline
        learnt += [False] * len(head) + [turn["role"] == "assistant"] * len(said) + [False] * len(newline)
    return ids, learnt


def render_chat(tokenizer, turns):
    """Return the ids of a conversation, ready for the assistant's next words."""
    return encode_chat(tokenizer, turns)[0] + [tokenizer.special_tokens[CHAT_START], *tokenizer.encode("assistant\n")]


def write(model, tokenizer, ids, config, ends):
    """Go on from `ids`; return a TextStream per sample. A single one is printed as it comes."""
    streams, stopped = [TextStream(tokenizer, config.stop) for _ in range(config.samples)], set()
    try:
        for new in generate(model, [ids] * config.samples, config, ends, tokenizer.vocab_size, stopped):
            for i, (token, logits) in new.items():
                piece = streams[i].feed([] if token in ends else [token])
                stopped |= {i} if streams[i].done else set()
                if config.samples == 1:
                    print(explain(logits, token, tokenizer) + "\n" if config.explain else piece, end="", flush=True)
    finally:                                                   # after Ctrl-C too
        rests = [stream.feed([], last=True) for stream in streams]
        print(rests[0] + "\n" if config.samples == 1 and not config.explain else "", end="")
    return streams


def chat(model, tokenizer, config, ends):
    """Talk in the terminal until Ctrl-D. When the context is full, the oldest turns are dropped."""
    ends, context, turns = ends | {tokenizer.special_tokens[CHAT_END]}, model.config.context, []
    room = context - min(config.max_tokens, context // 2)      # the answer needs a place too
    opening = [{"role": "system", "content": config.system}] if config.system else []
    print("Ask away (/reset forgets what was said, Ctrl-C stops an answer, Ctrl-D ends).")
    while True:
        try:
            question = {"role": "user", "content": input("> ").strip()}
        except EOFError:
            return print()
        if question["content"] in ("", "/reset"):
            turns = turns if not question["content"] else []
            continue
        if len(render_chat(tokenizer, [*opening, question])) > room:
            print(f"(too long: question and answer have to fit {context} tokens)")
            continue
        while len(ids := render_chat(tokenizer, [*opening, *turns, question])) > room:
            turns = turns[2:]
            print("(the oldest question and answer no longer fit and are forgotten)")
        limit = min(config.max_tokens, context - len(ids))
        try:
            answer = write(model, tokenizer, ids, replace(config, max_tokens=limit), ends)[0]
        except KeyboardInterrupt:
            print("(stopped; this question is forgotten)")
            continue
        print(f"(cut off after {limit} tokens)\n" if len(answer.ids) == limit else "", end="")
        turns += [question, {"role": "assistant", "content": answer.text}]


# ---- The script ----------------------------------------------------------------------------------
def open_model(folder, device):
    """Return (model, tokenizer, ids that end a text) of a folder. Raises CourseError if they do not fit."""
    model, tokenizer = chapter3.GPT.load(folder).eval(), chapter1.Tokenizer.load(folder)
    if tokenizer.vocab_size > (V := model.config.vocab_size):
        raise CourseError(f"{folder}: a tokenizer of {tokenizer.vocab_size:,} tokens cannot belong to a model of {V:,}")
    path = Path(folder) / "generation_config.json"
    settings = chapter1.read_json(path if path.exists() else path.with_name("config.json"), "04_train.py")
    ends = settings.get("eos_token_id")
    try:
        return model.to(device), tokenizer, set(ends if isinstance(ends, list) else [ends]) - {None}
    except (RuntimeError, AssertionError) as error:
        raise CourseError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None


def complete(model, tokenizer, ids, config, ends):
    """Write texts after the ids of a prompt; say how fast, and how much stands in the training data."""
    prompt, start, data = tokenizer.decode(ids), time.time(), Path(config.out) / "data"
    print(prompt if config.samples == 1 else "", end="\n" if config.explain else "", flush=True)
    streams = write(model, tokenizer, ids, config, ends)
    count, seconds = sum(len(stream.ids) for stream in streams), time.time() - start
    if config.samples > 1:
        print("\n".join(f"--- seed {config.seed + i}\n{prompt}{stream.text}" for i, stream in enumerate(streams)))
    print(f"[{count} tokens, {count / seconds:.0f} per second]", file=sys.stderr)
    tokens, meta = chapter2.open_tokens(data, "train") if (data / "meta.json").exists() else ([], {})
    for stream in streams if meta.get("fingerprint") == tokenizer.fingerprint() else ():
        longest, share = memorisation(stream.ids, tokens)
        print(f"[copied from training data: {longest} tokens in a row, {share:.0%} in runs of 20+]", file=sys.stderr)


def main(config):
    """Complete, talk, score or draw, as the flags say."""
    if config.temperature is None:
        config = replace(config, temperature=CHAT_TEMPERATURE if config.chat else 0.8)
    folder = Path(config.model or Path(config.out) / ("chat" if config.chat else "base"))
    model, tokenizer, ends = open_model(folder, config.device)
    if config.chat:
        path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        told = chapter1.read_json(settings, "01_tokenizer.py").get("chat_template") if settings.exists() else None
        template = path.read_text(encoding="utf-8") if path.exists() else str(told or "")
        if CHAT_START not in template or CHAT_START not in tokenizer.special_tokens:
            kind = "a chat template that is not ChatML" if template else "no chat template"
            raise CourseError(f"{folder} has {kind}: give it a --prompt, or talk to the one of 06_finetune.py")
        return chat(model, tokenizer, config, ends)
    try:
        text = Path(file).read_text(encoding="utf-8") if (file := config.score or config.prompt_file) else config.prompt
    except (OSError, UnicodeDecodeError) as error:
        raise CourseError(f"{file} cannot be read as UTF-8 text: {error}") from None
    if config.score:
        return show_score(model, tokenizer, text)
    ids = ([] if tokenizer.first is None else [tokenizer.first]) + tokenizer.encode(text)
    if not 1 <= len(ids) <= model.config.context:
        raise CourseError(f"the prompt has {len(ids)} tokens: this model takes 1 to {model.config.context}")
    draw_heatmap(model, tokenizer, ids, config) if config.heatmap else complete(model, tokenizer, ids, config, ends)


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
