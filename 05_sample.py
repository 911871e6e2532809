"""Chapter 5 · Sampling: let the model write, and look at what it thinks while it does.

The model gives a score to every token that could come next. Softmax turns the scores into
probabilities, and one token is drawn. It is appended, and the model is asked again. Always taking
the likeliest token is dull and tends to loop; drawing from all of them lets nonsense in. The
filters in between are compromises, each a few lines:

    scores (V,) -> temperature -> top-k, top-p -> softmax -> draw -> append -+
      ^            sharper, flatter  cut the unlikely tail                   |
      +-------------------------- ask the model again -----------------------+

Run:    python 05_sample.py --prompt "def read"         goes on with a text
        python 05_sample.py --chat                      talks, after chapter 6
        python 05_sample.py --explain                   shows the five likeliest tokens each time
        python 05_sample.py --score 01_tokenizer.py     shows where a text surprises the model
        python 05_sample.py --heatmap out/attention.png --prompt "for name in names: print(name)"
Prints: the text as it is written, then how much of it is copied from the training data
Source: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Carlini et al. 2021 (memorisation)
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

chapter1 = import_module("01_tokenizer")
chapter2 = import_module("02_data")
chapter3 = import_module("03_model")
chapter4 = import_module("04_train")
CourseError = chapter1.CourseError
CHAT_START = chapter1.CHAT_START
CHAT_END = chapter1.CHAT_END

# Legend
#   V        vocabulary; logits (V,) are the scores of all tokens, before softmax
#   stream   one text being written; each has random numbers of its own
#   ends     ids that end a text
#   message  {"role": "user", "assistant" or "system", "content": text}; a chat is a list of them
# `open_model` is a tool: it stands at the file's end.
CHAT_TEMPERATURE = 0.2  # low: an answer should be right rather than surprising


@dataclass
class Config:
    model: str = ""  # folder to sample from, any that chapter 3 opens (default: out/base or out/chat)
    prompt: str = "def"  # text to go on from; no space at its end: most tokens begin with theirs
    prompt_file: str = ""  # read the prompt from this file
    max_tokens: int = 200  # tokens to write at most
    temperature: float = 0.8  # below 1 sharper, above flatter, 0 the likeliest; to chat, 0.2
    top_k: int = 0  # draw among the k likeliest only (0: all)
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    samples: int = 1  # texts to write at once
    seed: int = 1  # of the draws: of the first text; the others have seed + 1, seed + 2, ...
    chat: bool = False  # talk: /reset forgets, Ctrl-C stops an answer, Ctrl-D ends
    system: str = ""  # instruction at the start of a chat
    explain: bool = False  # show the five likeliest tokens at each position, and the entropy
    score: str = ""  # show where this text file surprises the model, and bits per byte
    heatmap: str = ""  # draw the attention over the prompt's tokens to this file
    heatmap_layers: list[int] = field(default_factory=list)  # default: first, middle, last
    heatmap_heads: list[int] = field(default_factory=list)  # default: the first four
    device: str = ""  # cpu, cuda, mps (default: the fastest there is)
    out: str = "out"  # root folder of the course


# ---- From scores to one token --------------------------------------------------------------------
def keep_top_k(logits, k):
    """Leave the k highest scores, set the others to minus infinity, which softmax makes 0.

    >>> keep_top_k(torch.tensor([1., 3., 2.]), 2)
    tensor([-inf, 3., 2.])
    """
    best = logits.topk(min(k, len(logits)))
    return torch.full_like(logits, -math.inf).scatter(0, best.indices, best.values)


def keep_top_p(logits, p):
    """Leave the fewest likeliest tokens whose probabilities add up to p or more; at least one.

    Of .5 .3 .15 .05, p = 0.7 leaves .5 and .3: before the third, .8 are together already.
    """
    ordered, order = logits.softmax(-1).sort(descending=True)
    together = ordered.cumsum(-1)                              # (V,): .5 .8 .95 1
    enough = together[:-1] >= p                                # (V - 1,) of those before this one
    return logits.index_fill(0, order[1:][enough], -math.inf)


def next_token(logits, config, generator=None):
    """Choose an id: a pure function of scores (V,), settings and the generator's state."""
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k > 0:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


# ---- One token after the other, by its definition ------------------------------------------------
def window_start(length, context):
    """Return where the model's view of a text of `length` tokens begins.

    Past the context, the view moves on by half of it at a time: moving by one token would change
    every position, and a cache of what was read would be of no use.

    >>> [window_start(length, 8) for length in (1, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    half = max(1, context // 2)
    return max(0, math.ceil((length - context) / half) * half)


@torch.inference_mode()                                        # no gradients are wanted here
def generate_naive(model, ids, config, vocab_size=None):
    """Yield new ids after some: ask, draw, append, and ask again about all of the text."""
    text = list(ids)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.max_tokens):
        seen = text[window_start(len(text), model.config.context):]
        logits = model(torch.tensor([seen]))[0, -1, :vocab_size]               # (V,)
        text.append(next_token(logits, config, generator))
        yield text[-1]


# ---- For real: with a cache, many streams at once ------------------------------------------------
class KVCache:
    """The keys and values of the `length` positions read so far.

    A later token looks at them again but cannot change them: with what is kept here, the model
    reads each token once. (L, B, K, room, D) each; grouped heads, with K < H, need less of it.
    """
    def __init__(self, config, batch, room, device=None):
        shape = (config.layers, batch, config.kv_heads, room, config.head_width)
        self.keys = torch.zeros(shape, device=device)
        self.values = torch.zeros(shape, device=device)
        self.length = 0

    def append(self, layer, k, v):
        """Add k and v (B, K, T, D) of one layer; return all of them, (B, K, S, D) each."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@torch.inference_mode()
def generate(model, prompts, config, vocab_size=None):
    """Yield (new ids, one for each prompt; their logits (B, V)), again and again.

    prompts: lists of ids of equal length. Stream i draws with seed + i, whoever else is being
    written. Ids from vocab_size on only pad the model's table and are not drawn. The caller knows
    which streams have ended; when it has seen enough, it stops asking.
    """
    texts = [list(prompt) for prompt in prompts]
    generators = [torch.Generator().manual_seed(config.seed + i) for i in range(len(texts))]
    device = model.embed_tokens.weight.device
    room = min(model.config.context, len(texts[0]) + config.max_tokens)
    start = None
    for _ in range(config.max_tokens):
        begin = window_start(len(texts[0]), model.config.context)
        if begin == start:
            unread = [text[-1:] for text in texts]             # the cache knows the others
        else:
            start = begin
            cache = KVCache(model.config, len(texts), room, device)
            unread = [text[begin:] for text in texts]
        logits = model(torch.tensor(unread, device=device), cache=cache, last_only=True)
        logits = logits[:, 0, :vocab_size].float().cpu()       # (B, 1, V) -> (B, V)
        new = [next_token(*pair, generator) for *pair, generator in zip(logits, [config] * len(texts),
                                                                        generators)]
        for text, token in zip(texts, new):
            text.append(token)
        yield new, logits


def explain(logits, chosen, tokenizer):
    """Return a line: the token, the entropy in bits, and the five likeliest, before all filters.

    Entropy is the surprise to expect: 0 if the model is sure, 1 for a coin, 12 for 4,096 at random.
    """
    p = logits.softmax(-1)                                     # (V,)
    entropy = torch.special.entr(p).sum() / math.log(2)        # entr is -p log p, and 0 where p is 0
    line = f"{tokenizer.decode([chosen])!r:14} {entropy:5.2f} bits"
    for i in p.topk(min(5, len(p))).indices.tolist():
        line += f"   {p[i]:.2f} {tokenizer.decode([i])!r:10}"
    return line.rstrip()


def write(model, tokenizer, ids, config, ends):
    """Go on from `ids`; return the new ids of each stream. A single one is printed as it comes."""
    written = [[] for _ in range(config.samples)]
    going = set(range(config.samples))
    characters = codecs.getincrementaldecoder("utf-8")("replace")          # a token may be half of one
    for new, logits in generate(model, [ids] * config.samples, config, tokenizer.vocab_size):
        if config.explain:
            print(explain(logits[0], new[0], tokenizer))
        going -= {i for i in going if new[i] in ends}
        for i in going:
            written[i].append(new[i])
        if not going:
            break
        if config.samples == 1 and not config.explain:
            print(characters.decode(tokenizer.decode_bytes(new)), end="", flush=True)
    print()
    return written


# ---- Looking inside ------------------------------------------------------------------------------
@torch.inference_mode()
def attention_maps(model, ids):
    """Return the attention weights of every layer, (L, H, T, T), for a list of ids."""
    maps = []
    visible = chapter3.who_sees(len(ids), len(ids), device=model.embed_tokens.weight.device)

    def record(module, inputs):
        """Called with what an attention layer is about to read."""
        q, k, _ = module.project(*inputs[:2])
        # With unit vectors as values, the weighted mean of the values is the weights themselves.
        unit = torch.eye(len(ids), device=q.device).expand(*k.shape[:3], -1)   # (B, K, T, T)
        maps.append(chapter3.attention(q, k, unit, visible)[0])

    hooks = [block.self_attn.register_forward_pre_hook(record) for block in model.layers]
    model(torch.tensor([ids], device=model.embed_tokens.weight.device))
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


def draw_heatmap(model, tokenizer, ids, config):
    """Draw who looks at whom among the tokens of a prompt: a row per layer, a column per head."""
    L, H = model.config.layers, model.config.heads
    layers = config.heatmap_layers or sorted({0, L // 2, L - 1})
    heads = config.heatmap_heads or range(min(4, H))
    if max(layers) >= L or max(heads) >= H or len(ids) > 64:
        raise CourseError(f"--heatmap draws up to 64 tokens (here {len(ids)}), layers 0 to {L - 1}, "
                          f"heads 0 to {H - 1}")
    maps = attention_maps(model, ids).cpu()                    # (L, H, T, T)
    names = [repr(tokenizer.decode([i]))[1:-1].replace(" ", "·") for i in ids]
    side = max(2.4, 0.17 * len(ids))
    figure = Figure(figsize=(side * len(heads) + 2, side * len(layers) + 1), layout="constrained")
    axes = figure.subplots(len(layers), len(heads), sharex=True, sharey=True, squeeze=False)
    for layer, row in zip(layers, axes):
        for head, axis in zip(heads, row):
            picture = axis.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1)
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
            axis.set_xticks(range(len(ids)), names, rotation=90, fontsize=8, parse_math=False)
            axis.set_yticks(range(len(ids)), names, fontsize=8, parse_math=False)
    figure.colorbar(picture, ax=axes, shrink=0.8).set_label("weight of the token below", fontsize=8)
    chapter1.save_figure(figure, config.heatmap)
    print(f"drew {config.heatmap}: how much the token on the left looks at the one below")


@torch.inference_mode()
def score(model, tokenizer, text):
    """Return ([(token, bits)], bits per byte) of a text, read in pieces of the model's context."""
    ids = tokenizer.encode(text)
    mark = tokenizer.first
    if mark is None:
        mark = tokenizer.special_tokens.get(tokenizer.end)     # something to start from
    if mark is not None:
        ids = [mark, *ids]
    T, bits = model.config.context, []
    for start in range(0, len(ids) - 1, T):
        piece = torch.tensor(ids[start:start + T + 1], device=model.embed_tokens.weight.device)
        log_p = model(piece[None, :-1])[0].float().log_softmax(-1)             # (T, V)
        nats = -log_p.gather(1, piece[1:, None])[:, 0]                         # (T, V) -> (T,)
        bits += (nats / math.log(2)).tolist()
    size = len(tokenizer.decode_bytes(ids[1:]))
    return list(zip(ids[1:], bits)), sum(bits) / max(1, size)


def show_score(model, tokenizer, text):
    """Print a text with the bits that its tokens cost: on a terminal in grey, blues, oranges."""
    scored, bits_per_byte = score(model, tokenizer, text)
    shades = (235, 18, 25, 94, 130, 166)
    pieces = [tokenizer.decode([token]) for token, _ in scored]
    colours = [shades[min(int(bits / 2), 5)] for _, bits in scored]
    print(chapter1.show_tokens(pieces, colours or shades))
    worst = sorted(scored, key=lambda pair: -pair[1])[:8]
    print("most surprising:", *[f"{tokenizer.decode([i])!r} {bits:.0f} bits," for i, bits in worst])
    print(f"{bits_per_byte:.3f} bits per byte (lighter colours: more bits)")


def memorisation(ids, tokens, long=20):
    """Return (the longest run of ids that stands verbatim in tokens, the share of ids in long runs).

    What is copied is a question of privacy and of licences. Good to some 10^7 tokens.

    >>> memorisation([5, 1, 2, 3, 9], np.array([0, 1, 2, 3, 4]), long=3)
    (3, 0.6)
    """
    data = "".join(map(chr, tokens.tolist()))                  # a character for each token, so that
    mine = "".join(map(chr, ids))                              # Python's `in` can search
    longest, end, covered = 0, 0, set()
    for start in range(len(mine)):
        end = max(end, start)                                  # a run ends no sooner than the last
        while end < len(mine) and mine[start:end + 1] in data:
            end += 1
        longest = max(longest, end - start)
        if end - start >= long:
            covered.update(range(start, end))
    return longest, len(covered) / max(1, len(ids))


# ---- Chat ----------------------------------------------------------------------------------------
# The same in the language that tokenizers of transformers are told it in.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def encode_chat(tokenizer, messages):
    """Return (ids, learnt) of a chat in ChatML; learnt marks the assistant's words and their end.

        <|im_start|>user
        Say hello.<|im_end|>
        <|im_start|>assistant
        Hello!<|im_end|>                                       of this line all but the line end
    """
    start, end = tokenizer.special_tokens[CHAT_START], tokenizer.special_tokens[CHAT_END]
    newline = tokenizer.encode("\n")
    ids, learnt = [], []
    for message in messages:
        opening = [start, *tokenizer.encode(message["role"] + "\n")]
        said = [*tokenizer.encode(message["content"].strip()), end]        # nobody can type a special
        ids += opening + said + newline
        is_learnt = message["role"] == "assistant"
        learnt += [False] * len(opening) + [is_learnt] * len(said) + [False] * len(newline)
    return ids, learnt


def render_chat(tokenizer, messages):
    """Return the ids of a chat, ready for the assistant's next words."""
    ids, _ = encode_chat(tokenizer, messages)
    return ids + [tokenizer.special_tokens[CHAT_START], *tokenizer.encode("assistant\n")]


def answer(model, tokenizer, config, ends, messages):
    """Print the answer to the last message, and return the messages with it added.

    When the context is full, the oldest question and answer are forgotten.
    """
    context = model.config.context
    room = context - min(config.max_tokens, context // 2)      # the answer has to fit as well
    opening = [{"role": "system", "content": config.system}] if config.system else []
    ids = render_chat(tokenizer, opening + messages)
    while len(ids) > room and len(messages) > 1:
        messages = messages[2:]
        ids = render_chat(tokenizer, opening + messages)
    if len(ids) > room:
        print(f"(too long: question and answer have to fit {context} tokens)")
        return messages[:-1]
    limit = min(config.max_tokens, context - len(ids))
    (written,) = write(model, tokenizer, ids, replace(config, max_tokens=limit), ends)
    if len(written) == limit:
        print(f"(cut off after {limit} tokens)")
    return messages + [{"role": "assistant", "content": tokenizer.decode(written)}]


def chat(model, tokenizer, config, ends):
    """Talk in the terminal until Ctrl-D."""
    if CHAT_END not in tokenizer.special_tokens:
        raise CourseError("this model knows no ChatML: talk to the one that 06_finetune.py makes")
    ends = ends | {tokenizer.special_tokens[CHAT_END]}
    messages = []
    print("Ask away (/reset forgets what was said, Ctrl-C stops an answer, Ctrl-D ends).")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if question == "/reset":
            messages = []
        elif question:
            asked = messages + [{"role": "user", "content": question}]
            try:
                messages = answer(model, tokenizer, config, ends, asked)
            except KeyboardInterrupt:
                print("(stopped; this question is forgotten)")


# ---- The script ----------------------------------------------------------------------------------
def defaults_for(given):
    """Return the temperature to chat at. Raises CourseError for flags that do nothing together."""
    modes = given.keys() & {"chat", "score", "heatmap"}
    if len(modes) > 1 or (modes & {"chat", "score"} and given.keys() & {"prompt", "prompt_file"}):
        raise CourseError("--chat, --score, --heatmap and a prompt are different things: choose")
    if given.keys() & {"heatmap_layers", "heatmap_heads"} and "heatmap" not in given:
        raise CourseError("--heatmap-layers and --heatmap-heads belong to --heatmap FILE")
    return {"temperature": CHAT_TEMPERATURE} if given.get("chat") else {}


def complete(model, tokenizer, ids, config, ends):
    """Write after the ids of a prompt; say how fast, and how much stands in the training data."""
    print(tokenizer.decode(ids), end="", flush=True)
    start = time.time()
    streams = write(model, tokenizer, ids, config, ends)
    seconds = time.time() - start
    if config.samples > 1:
        for i, written in enumerate(streams):
            print(f"--- seed {config.seed + i}\n{tokenizer.decode(ids + written)}")
    count = sum(map(len, streams))
    print(f"[{count} tokens, {count / seconds:.0f} per second]", file=sys.stderr)
    data = Path(config.out) / "data"
    if not (data / "meta.json").exists():
        return
    tokens, meta = chapter2.open_tokens(data, "train")
    if meta["fingerprint"] == tokenizer.fingerprint():
        for written in streams:
            longest, share = memorisation(written, tokens[:10_000_000])
            print(f"[copied from the training data: {longest} tokens at a stretch, {share:.0%} in "
                  "stretches of 20 or more]", file=sys.stderr)


def main(config):
    """Complete, talk, score or draw, as the flags say."""
    usual = Path(config.out) / ("chat" if config.chat else "base")
    device = chapter4.choose_device(config.device)
    model, tokenizer, ends = open_model(config.model or usual, device)
    if config.chat:
        return chat(model, tokenizer, replace(config, samples=1), ends)
    if config.score:
        return show_score(model, tokenizer, Path(config.score).read_text(encoding="utf-8"))
    prompt = config.prompt
    if config.prompt_file:
        prompt = Path(config.prompt_file).read_text(encoding="utf-8")
    ids = tokenizer.encode(prompt)
    if tokenizer.first is not None:
        ids = [tokenizer.first, *ids]
    if not 1 <= len(ids) <= model.config.context:
        raise CourseError(f"the prompt has {len(ids)} tokens: this model takes 1 to "
                          f"{model.config.context}")
    if config.heatmap:
        return draw_heatmap(model, tokenizer, ids, config)
    complete(model, tokenizer, ids, config, ends)


# ---- Tools ---------------------------------------------------------------------------------------
def open_model(folder, device, context=0):
    """Return (model, tokenizer, ids that end a text) of a folder. Raises CourseError."""
    folder = Path(folder)
    model = chapter3.GPT.load(folder, context).eval().to(device)
    tokenizer = chapter1.Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CourseError(f"{folder}: a tokenizer of {tokenizer.vocab_size:,} tokens does not belong "
                          f"to a model of {model.config.vocab_size:,}")
    settings = folder / "generation_config.json"
    if not settings.exists():
        settings = folder / "config.json"
    found = chapter1.read_json(settings, "04_train.py")
    ends = found.get("eos_token_id") if isinstance(found, dict) else None
    return model, tokenizer, set(ends if isinstance(ends, list) else [ends]) - {None}


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__, defaults_for)
