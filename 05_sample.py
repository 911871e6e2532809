"""Chapter 5 · Sampling: let the model write, and look at what it thinks while it does.

The model gives a score to every token that could come next. Softmax turns the scores into
probabilities, and one token is drawn. It is appended, and the model is asked again. Always taking the
likeliest token is dull and tends to loop; drawing from all of them lets nonsense in. The filters
between scores and draw are compromises, each a few lines:

    scores -> repetition penalty -> temperature -> top-k -> top-p -> min-p -> softmax -> draw
    (V,)      seen tokens weaker    sharper, flatter  cut the unlikely tail

Run:    python 05_sample.py --prompt "def read_"             completes a text
        python 05_sample.py --chat --model out/chat          talks, after chapter 6
        python 05_sample.py --explain                        shows the five likeliest tokens each time
        python 05_sample.py --heatmap out/attention.png      draws where the heads look
        python 05_sample.py --score 01_tokenizer.py          colours a text by the model's surprise
Prints: the text as it is written, then how much of it is copied from the training data.
Source: Holtzman et al. 2020 (top-p), Nguyen et al. 2024 (min-p), Keskar et al. 2019 (repetition
        penalty), Carlini et al. 2021 (memorisation).
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

chapter1, chapter2, chapter3 = map(import_module, ("01_tokenizer", "02_data", "03_model"))
CourseError, Tokenizer, GPT = chapter1.CourseError, chapter1.Tokenizer, chapter3.GPT
CHAT_START, CHAT_END = chapter1.CHAT_START, chapter1.CHAT_END

# Legend
#   V        vocabulary; logits (V,) are the scores of all tokens, before softmax
#   stream   one text being written; each has its own random generator
#   turn     one message of a chat: {"role": "user" or "assistant", "content": text}
SURPRISE = (236, 22, 58, 94, 130, 124)  # terminal colours: from expected (dark) to surprising (red)
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim"
                 " + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


@dataclass
class Config:
    model: str = ""  # folder to sample from, ours or any that chapter 3 opens (default: out/base, with --chat out/chat)
    prompt: str = "def "  # text to go on from
    prompt_file: str = ""  # read the prompt from this file
    max_tokens: int = 200  # tokens to write at most
    temperature: float | None = None  # below 1 sharper, above 1 wilder, 0 always the likeliest (default: 0.8, in a chat 0.3)
    top_k: int = 0  # draw among the k likeliest only (0: all)
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest
    repetition_penalty: float = 1.0  # divide the odds of tokens already written; 1 does nothing
    stop: list[str] = field(default_factory=list)  # stop before any of these texts
    samples: int = 1  # texts to write at once, from seed, seed + 1, ...
    seed: int = 1  # of the draws
    cache: bool = True  # keep keys and values of what was read (--no-cache computes all of it anew)
    chat: bool = False  # talk: /reset forgets, Ctrl-D ends
    explain: bool = False  # show the five likeliest tokens at each place, and the entropy
    heatmap: str = ""  # draw the attention over the prompt's tokens to this file
    heatmap_layers: list[int] = field(default_factory=list)  # layers to draw (default: first, middle, last)
    score: str = ""  # print bits per byte of this text file and colour its tokens by surprise
    device: str = "cpu"  # cpu, cuda or mps
    out: str = "out"  # root folder of the course


# ---- The choice of one token ---------------------------------------------------------------------

def penalise(logits, seen, penalty):
    """Make the tokens in `seen` less likely: positive scores are divided, negative ones multiplied."""
    logits, seen = logits.clone(), torch.tensor(sorted(set(seen)), dtype=torch.long)
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def keep_top_k(logits, k):
    """Leave the k highest scores, set the others to minus infinity."""
    return logits.masked_fill(logits < logits.topk(min(k, len(logits))).values[-1], -math.inf)


def keep_top_p(logits, p):
    """Leave the fewest likeliest tokens whose probabilities add up to p or more."""
    ordered, order = logits.softmax(-1).sort(descending=True)
    return logits.index_fill(0, order[ordered.cumsum(-1) - ordered >= p], -math.inf)     # sum before it


def keep_min_p(logits, share):
    """Leave tokens at least `share` as likely as the likeliest."""
    return logits.masked_fill(logits < logits.max() + math.log(share), -math.inf)


def next_token(logits, config, seen=(), generator=None):
    """Choose a token: a pure function of scores (V,), settings, tokens seen and the generator's state."""
    logits = logits.float().cpu()
    if config.repetition_penalty != 1:
        logits = penalise(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p:
        logits = keep_min_p(logits, config.min_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


# ---- Generation ----------------------------------------------------------------------------------

@torch.no_grad()
def generate(model, prompts, config, ends=()):
    """Yield {stream: (new id, logits (V,))} step by step for prompts of equal length (lists of ids).

    Stream i draws with seed + i, whoever else is being written. It ends with an id in `ends`, which is
    yielded, or after max_tokens. Text beyond the context goes on by chapter 3's window_start.
    """
    texts, context = [list(prompt) for prompt in prompts], model.config.context
    generators = [torch.Generator().manual_seed(config.seed + i) for i in range(len(texts))]
    device, alive, cache, start = model.embed_tokens.weight.device, list(range(len(texts))), None, None
    for _ in range(config.max_tokens):
        begin = chapter3.window_start(len(texts[alive[0]]), context)
        if config.cache and begin == start:
            logits = model(torch.tensor([texts[i][-1:] for i in alive], device=device), cache=cache)[:, -1]
        else:
            rows = [texts[i][begin:] for i in alive]
            shared = all(row == rows[0] for row in rows)                       # read an equal prompt once
            ids = torch.tensor(rows[:1] if shared else rows, device=device)     # (B, T)
            cache, start = chapter3.KVCache(model.config, len(ids), device) if config.cache else None, begin
            logits = model(ids, cache=cache)[:, -1]                             # (B, T, V) -> (B, V)
            if shared:
                logits = logits.expand(len(alive), -1)
                cache.select([0] * len(alive)) if cache else None
        new = {i: (next_token(row, config, texts[i], generators[i]), row) for i, row in zip(alive, logits)}
        for i, (token, _) in new.items():
            texts[i].append(token)
        yield new
        going = [row for row, i in enumerate(alive) if new[i][0] not in ends]
        if not going:
            return
        if len(going) < len(alive):
            alive = [alive[row] for row in going]
            cache.select(going) if cache else None


class TextStream:
    """Turn ids into text as they come: whole characters only, and nothing from a stop text on."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops, self.held, self.done = tokenizer, stops, "", False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids, last=False):
        """Return the text that is certain after `ids`; `last` lets go of what was held back."""
        self.held += self.decoder.decode(self.tokenizer.decode_bytes(ids), last)
        cuts = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if cuts:
            text, self.held, self.done = self.held[:min(cuts)], "", True
            return text
        keep = 0 if last else max((n for stop in self.stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        text, self.held = self.held[:len(self.held) - keep], self.held[len(self.held) - keep:]
        return text


# ---- Looking inside ------------------------------------------------------------------------------

def explain(logits, chosen, tokenizer):
    """Return a line: the token, the entropy in bits, and the five likeliest with probabilities."""
    probabilities = logits.float().softmax(-1)
    entropy = -(probabilities * probabilities.clamp_min(1e-12).log2()).sum()
    best = "  ".join(f"{tokenizer.decode([i])!r} {p:.2f}" for p, i in zip(*(x.tolist() for x in probabilities.topk(5))))
    return f"{tokenizer.decode([chosen])!r:16} {entropy:5.2f} bits   {best}"


@torch.no_grad()
def attention_maps(model, ids):
    """Return the attention weights of every layer, (layers, H, T, T), for a list of ids."""
    maps = []

    def record(module, inputs):
        q, k, _ = module.project(*inputs[:2])
        everyone = torch.eye(q.shape[2], device=q.device).expand(*k.shape[:3], -1)        # with unit vectors as values,
        maps.append(chapter3.attention(q, k, everyone, "formula")[0])                     # the mean is the weights

    hooks = [block.self_attn.register_forward_pre_hook(record) for block in model.layers]
    model(torch.tensor([ids], device=model.embed_tokens.weight.device))
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


def draw_heatmap(model, tokenizer, ids, layers, path):
    """Draw who looks at whom among the tokens of a prompt: a row per layer, a column per head."""
    import_module("matplotlib").use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    ids = ids[-40:]
    maps, names = attention_maps(model, ids).cpu(), [repr(tokenizer.decode([i]))[1:-1] for i in ids]
    layers = layers or sorted({0, len(maps) // 2, len(maps) - 1})
    heads = min(4, maps.shape[1])
    figure, axes = pyplot.subplots(len(layers), heads, figsize=(3.4 * heads, 3.4 * len(layers)), layout="constrained", squeeze=False)
    for row, layer in zip(axes, layers):
        for head, axis in enumerate(row):
            axis.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1)
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
            axis.set_xticks(range(len(ids)), names, rotation=90, fontsize=6)
            axis.set_yticks(range(len(ids)), names, fontsize=6)
    with chapter1.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


@torch.no_grad()
def score(model, tokenizer, text):
    """Return (bits per byte, [(piece, bits)]) of a text, read in blocks of the model's context."""
    ids = tokenizer.encode(text)
    ids, T, bits = [tokenizer.special_tokens.get(chapter1.END_OF_TEXT, ids[0])] + ids, model.config.context, []
    for start in range(0, len(ids) - 1, T):
        part = torch.tensor(ids[start:start + T + 1], device=model.embed_tokens.weight.device)
        chances = model(part[None, :-1])[0].float().log_softmax(-1)               # (T, V)
        bits += (-chances.gather(1, part[1:, None])[:, 0] / math.log(2)).tolist()
    return sum(bits) / max(1, len(text.encode())), [(tokenizer.decode([i]), b) for i, b in zip(ids[1:], bits)]


def copied_runs(ids, tokens):
    """Return for each place of `ids` how many tokens from there on stand verbatim somewhere in `tokens`."""
    runs = []
    for start in range(len(ids)):
        places, length = np.flatnonzero(tokens == ids[start]), 0
        while len(places):
            length += 1
            places = places[places + length < len(tokens)]
            places = places[tokens[places + length] == ids[start + length]] if start + length < len(ids) else []
        runs.append(length)
    return runs


def memorisation(ids, tokens):
    """Return (longest verbatim run, share of the ids that lie in runs of 20 or more)."""
    runs, covered = copied_runs(ids, tokens), set()
    for start, run in enumerate(runs):
        covered |= set(range(start, start + run)) if run >= 20 else set()
    return max(runs, default=0), len(covered) / max(1, len(ids))


# ---- Chat ----------------------------------------------------------------------------------------

def encode_chat(tokenizer, turns):
    """Return (ids, trained) of a conversation in ChatML: trained marks what the assistant says, end included.

    What a person wrote is encoded as plain text, so it can never become a special token.
    """
    start, end = tokenizer.special_tokens[CHAT_START], tokenizer.special_tokens[CHAT_END]
    newline, ids, trained = tokenizer.encode("\n"), [], []
    for turn in turns:
        head = [start, *tokenizer.encode(turn["role"] + "\n")]
        said = [*tokenizer.encode(turn["content"].strip()), end]
        ids += head + said + newline
        trained += [False] * len(head) + [turn["role"] == "assistant"] * len(said) + [False] * len(newline)
    return ids, trained


def render_chat(tokenizer, turns):
    """Return the ids of a conversation, ready for the assistant's next words."""
    return [*encode_chat(tokenizer, turns)[0], tokenizer.special_tokens[CHAT_START], *tokenizer.encode("assistant\n")]


def write(model, tokenizer, ids, config, ends):
    """Print a completion of `ids` as it is written; return its ids and text."""
    stream, written, text = TextStream(tokenizer, config.stop), [], ""
    for new in generate(model, [ids], config, ends):
        token, logits = new[0]
        written.append(token)
        piece = "" if token in ends else stream.feed([token])
        print(explain(logits, token, tokenizer) if config.explain else piece, end="\n" if config.explain else "", flush=True)
        text += piece
        if stream.done:
            break
    rest = stream.feed([], last=True)
    print("" if config.explain else rest)
    return written, text + rest


def chat(model, tokenizer, config, ends):
    """Talk in the terminal until Ctrl-D; the oldest turns are dropped when the context is full."""
    turns, room = [], model.config.context - config.max_tokens
    print("Ask away (/reset forgets what was said, Ctrl-D ends).")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if question == "/reset":
            turns = []
        if not question or question == "/reset":
            continue
        turns.append({"role": "user", "content": question})
        while len(turns) > 1 and len(render_chat(tokenizer, turns)) > room:
            turns = turns[2:]
            print("(the oldest question and answer no longer fit and are forgotten)")
        ids = render_chat(tokenizer, turns)
        if len(ids) > room:
            print(f"(that is {len(ids)} tokens; with --max-tokens {config.max_tokens} only {room} fit: ask in fewer words)")
            turns.pop()
            continue
        _, answer = write(model, tokenizer, ids, config, ends)
        turns.append({"role": "assistant", "content": answer})


# ---- The script ----------------------------------------------------------------------------------

def check(config):
    """Refuse settings that cannot work, naming value and limit."""
    limits = {"temperature": (0, 100), "top_k": (0, 10**9), "top_p": (1e-9, 1), "min_p": (0, 1), "samples": (1, 10**4),
              "repetition_penalty": (1e-9, 100), "max_tokens": (1, 10**9)}
    for name, (low, high) in limits.items():
        if not low <= getattr(config, name) <= high:
            raise CourseError(f"--{name.replace('_', '-')} {getattr(config, name)} must be between {low:g} and {high:g}")


def read_text(path):
    """Return the text of a UTF-8 file. Raises CourseError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CourseError(f"{path} cannot be read as UTF-8 text: {error}") from None


def open_model(folder, device):
    """Return (model, tokenizer, ids that end a text) of a folder. Raises CourseError if they do not fit."""
    folder = Path(folder)
    model, tokenizer = GPT.load(folder).eval(), Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CourseError(f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model {model.config.vocab_size:,}: "
                          "they do not belong together")
    path = folder / "generation_config.json"
    ends = chapter1.read_json(path, "04_train.py").get("eos_token_id") if path.exists() else None
    ends = ends if isinstance(ends, list) else [ends]
    try:
        return model.to(device), tokenizer, set(ends) - {None}
    except (RuntimeError, AssertionError) as error:
        raise CourseError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None


def main(config):
    """Complete, talk, score or draw, as the flags say."""
    default = 0.3 if config.chat else 0.8
    config = replace(config, temperature=default if config.temperature is None else config.temperature)
    check(config)
    folder = config.model or Path(config.out) / ("chat" if config.chat else "base")
    model, tokenizer, ends = open_model(folder, config.device)
    if config.chat:
        if not (Path(folder) / "chat_template.jinja").exists():
            raise CourseError(f"{folder} has no chat template: it can only complete text; 06_finetune.py makes one that talks")
        return chat(model, tokenizer, config, ends)
    if config.score:
        bits, pieces = score(model, tokenizer, read_text(config.score))
        print(chapter1.show_tokens([f"{piece}" if sys.stdout.isatty() else f"{piece}⟨{b:.0f}⟩" for piece, b in pieces],
                                   [SURPRISE[min(int(b / 2), len(SURPRISE) - 1)] for _, b in pieces]))
        print(f"{bits:.3f} bits per byte, {sum(b for _, b in pieces) / max(1, len(pieces)):.2f} bits per token")
        return
    prompt = read_text(config.prompt_file) if config.prompt_file else config.prompt
    ids = ([tokenizer.first] if tokenizer.first is not None else []) + tokenizer.encode(prompt)
    if not ids:
        raise CourseError("--prompt is empty: give the model at least one token to go on from")
    if len(ids) > model.config.context:
        print(f"the prompt has {len(ids)} tokens; the model sees the last of them, {model.config.context} at most", file=sys.stderr)
    if config.heatmap:
        draw_heatmap(model, tokenizer, ids, config.heatmap_layers, config.heatmap)
        print(f"drew {config.heatmap}")
        return
    start, count, texts = time.time(), 0, []
    if config.samples == 1:
        print(prompt, end="", flush=True)
        written, _ = write(model, tokenizer, ids, config, ends)
        texts = [written]
    else:
        texts = [[] for _ in range(config.samples)]
        for new in generate(model, [ids] * config.samples, config, ends):
            for i, (token, _) in new.items():
                texts[i].append(token)
        for i, text in enumerate(texts):
            print(f"--- seed {config.seed + i}\n{prompt}{TextStream(tokenizer, config.stop).feed([t for t in text if t not in ends], True)}")
    count = sum(map(len, texts))
    print(f"[{count} tokens, {count / (time.time() - start):.0f} per second]", file=sys.stderr)
    data = Path(config.out) / "data"
    if (data / "meta.json").exists():
        tokens, meta = chapter2.open_tokens(data, "train")
        if meta["fingerprint"] == tokenizer.fingerprint():
            longest, share = memorisation(texts[0], np.asarray(tokens))
            print(f"[copied from the training data: the longest run is {longest} tokens; {share:.0%} of the text "
                  "lies in runs of 20 or more]", file=sys.stderr)


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__)
