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
        python 05_sample.py --heatmap out/attention.png --prompt "for name in names: print(name)"
Prints: the text as it is written, then how much of it is copied from the training data
Source: Fan et al. 2018 (top-k), Holtzman et al. 2020 (top-p), Carlini et al. 2021 (memorisation)
"""
import codecs
import math
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import torch
from matplotlib.figure import Figure

chapter1 = import_module("01_tokenizer")
chapter2 = import_module("02_data")
chapter3 = import_module("03_model")
chapter4 = import_module("04_train")
CourseError = chapter1.CourseError

# Legend
#   V        vocabulary; logits (V) are the scores of all tokens
#   B texts, T new positions, S all so far, H heads, K heads with keys of their own, D numbers each
#   stream   one text being written; each has random numbers of its own
#   ends     ids that end a text
#   message  {"role": "user", "assistant" or "system", "content": text}; a chat is a list of them


# ---- From scores to one token --------------------------------------------------------------------
# softmax(scores)    .50 .30 .15 .05      of four tokens: e^score over the sum of all e^score
# temperature 0.5    .68 .25 .06 .01      scores / 0.5: the same as squares, scaled to sum to 1
# temperature 2      .38 .29 .21 .12
# top-k 3            .53 .32 .16   0      the three likeliest
# top-p 0.7          .62 .38   0   0      the likeliest, till they have more than 0.7 together
def keep_top_k(logits, k):
    """Leave the k highest scores; set the others to minus infinity, which softmax makes 0."""
    order = logits.argsort(descending=True)
    return logits.index_fill(0, order[k:], -math.inf)


def keep_top_p(logits, p):
    """Leave the likeliest tokens: the fewest that together have a probability of more than p."""
    chances, order = logits.softmax(-1).sort(descending=True)
    likelier = chances.cumsum(-1) - chances                    # (V), of all before: 0 .50 .80 .95
    return logits.index_fill(0, order[likelier > p], -math.inf)


def next_token(logits, config, generator=None):
    """Draw an id; it depends on scores (V), settings and the generator's state alone. (multinomial
    draws one index, by these probabilities.)"""
    if config.temperature == 0:
        return int(logits.argmax())
    logits = logits / config.temperature
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


# ---- One token after the other, by its definition ------------------------------------------------
def as_tensor(model, ids):
    """Return ids as a tensor on the model's device."""
    return torch.tensor(ids, device=model.embed_tokens.weight.device)


@torch.inference_mode()                                        # no gradients are wanted here
def generate_naive(model, ids, config):
    """Yield the ids that go on from some: ask, draw, append, ask again about all of the text."""
    seen = list(ids)
    context = model.config.context
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.max_tokens):
        if len(seen) > context:                                # more do not fit: keep a half
            seen = seen[-context // 2:]
        logits = model(as_tensor(model, [seen]))[0, -1]                         # (V)
        seen.append(next_token(logits.cpu(), config, generator))
        yield seen[-1]


# ---- For real: with a cache, many streams at once ------------------------------------------------
class KVCache:
    """The keys and values of the `length` positions read so far.

    A new token changes nothing about those before it, as no position sees a later one: it only
    looks at their keys and values. With these kept, the model reads each token just once."""

    def __init__(self, size):
        self.size = size                                       # of positions at most
        self.keys_values = {}                                  # {Attention: (2, B, K, size, D)}
        self.length = 0                                        # GPT.forward moves it on, at its end

    def append(self, layer, k, v):
        """Add k and v (B, K, T, D) of one layer; return all of them, (B, K, S, D) each."""
        if layer not in self.keys_values:
            # Room for all to come: growing would copy what is there with each new token.
            B, K, _, D = k.shape
            self.keys_values[layer] = k.new_empty(2, B, K, self.size, D)
        kept = self.keys_values[layer][..., :self.length + k.shape[2], :]      # (2, B, K, S, D)
        kept[..., self.length:, :] = torch.stack((k, v))       # kept is a view: this fills the room
        return kept                                            # its first axis: k, v = kept


@torch.inference_mode()
def generate(model, prompts, config, vocab_size=None):
    """Yield (new ids, one for each prompt; their logits (B, V)), up to max_tokens times.

    prompts: lists of ids of equal length, many in chapter 6. Stream i draws by seed + i, on the
    CPU: the same random numbers on any device, and whatever else is written. Ids from vocab_size on
    only pad the model's table: none is drawn."""
    generators = [torch.Generator().manual_seed(config.seed + i) for i in range(len(prompts))]
    seen = as_tensor(model, prompts)                            # (B, S)
    context = model.config.context
    cache = KVCache(min(context, seen.shape[1] + config.max_tokens))
    for _ in range(config.max_tokens):
        if seen.shape[1] > context:
            # Kept keys were made from dropped tokens, at old positions: all is read anew. Half a
            # context is dropped at once, so that this is rare.
            seen = seen[:, -context // 2:]
            cache = KVCache(context)
        unread = seen[:, cache.length:]                        # (B, T), most often (B, 1)
        logits = model(unread, cache=cache, last_only=True)    # (B, 1, V)
        logits = logits[:, 0, :vocab_size].cpu()               # (B, V)
        new = [next_token(scores, config, own) for scores, own in zip(logits, generators)]
        seen = torch.cat((seen, as_tensor(model, new)[:, None]), dim=1)        # (B, S + 1)
        yield new, logits


# ---- Looking at it: what the model thinks --------------------------------------------------------
def explain(logits, chosen, tokenizer):
    """Return a line: the token, the entropy in bits, the five likeliest, at temperature 1. Entropy
    is the surprise to expect: 0 if the model is sure, 1 for a coin, 12 for 4,096 at random."""
    p = logits.softmax(-1)                                     # (V)
    entropy = torch.special.entr(p).sum() / math.log(2)        # entr is -p ln p; where p is 0, 0
    line = f"\n{tokenizer.decode([chosen])!r:14} {entropy:5.2f} bits"
    for i in p.topk(5).indices.tolist():
        line += f"   {p[i]:.2f} {tokenizer.decode([i])!r:10}"
    return line


@torch.inference_mode()
def attention_maps(model, ids):
    """Return the attention weights of every layer, (L, H, T, T), for a list of ids."""
    maps = []

    def record(layer, inputs):
        """Called before each attention layer with what it is about to read."""
        x, angles, visible, _cache = inputs
        q, k, _ = layer.project(x, angles)
        # Attention gives weights @ values; with the identity as values, that is the weights.
        unit = torch.eye(len(ids), device=x.device).repeat(1, k.shape[1], 1, 1)    # (1, K, T, T)
        weights = chapter3.attention(q, k, unit, visible, model.config.attention)
        maps.append(weights[0])                                    # (H, T, T)

    hooks = [block.self_attn.register_forward_pre_hook(record) for block in model.layers]
    model(as_tensor(model, [ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(maps)


def draw_heatmap(model, tokenizer, ids, path):
    """Draw who looks at whom among the tokens of a prompt: a row a layer, a column a head."""
    ids = ids[:64]                                             # more labels would be too small
    maps = attention_maps(model, ids)[:, :4].numpy(force=True)                 # (L, H, T, T)
    L, H, T, _ = maps.shape                                    # H: four heads at most
    layers = sorted({0, L // 2, L - 1})                        # edit this to see others
    names = [repr(tokenizer.decode([i])) for i in ids]
    side = 1.5 + 0.17 * T                                      # inches
    figure = Figure(figsize=(side * H, side * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), H, squeeze=False)
    for layer, row in zip(layers, axes):
        for head, axis in enumerate(row):
            picture = axis.imshow(maps[layer, head], cmap="Blues", vmin=0, vmax=1)
            axis.set_title(f"layer {layer}, head {head}")
            axis.set_xticks(range(T), names, rotation=90, parse_math=False)    # $ is no formula
            axis.set_yticks(range(T), names, parse_math=False)
    figure.colorbar(picture, ax=axes, aspect=40, label="weight of the token below")
    chapter1.save_figure(figure, path)
    print(f"drew {path}: how much the token on the left looks at the one below")


def memorisation(ids, tokens):
    """Return the length of the longest run of ids that stands in tokens too. What a model knows by
    heart is a question of privacy, and of licences.

    >>> memorisation([5, 1, 2, 3, 9], torch.tensor([0, 1, 2, 3, 4]))
    3
    """
    # A character for each token, and Python's `in` does the search: seconds for 10^7 tokens.
    data = "".join(map(chr, tokens.tolist()))
    text = "".join(map(chr, ids))
    longest = 0
    for last in range(len(text)):
        # The longest grows by at most one at each position, so only that length is looked for.
        if text[last - longest:last + 1] in data:
            longest += 1
    return longest


# ---- Writing to the screen, and a chat -----------------------------------------------------------
def write(model, tokenizer, ids, config, ends):
    """Go on from `ids` and print the text as it comes; return the new ids, without the end."""
    # A token may be half a character: then its bytes wait for the other half.
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    written = []
    for (token,), logits in generate(model, [ids], config, tokenizer.vocab_size):
        if token in ends:
            break
        written.append(token)
        if config.explain:
            shown = explain(logits[0], token, tokenizer)
        else:
            shown = characters.decode(tokenizer.decode_bytes([token]))
        print(shown, end="", flush=True)
    print()
    return written


def encode_chat(tokenizer, messages):
    """Return (ids, learnt) of a chat in ChatML; learnt is True for the assistant's words and
    their end: only these does chapter 6 train on.

        <|im_start|>user
        Say hello.<|im_end|>
        <|im_start|>assistant
        Hello!<|im_end|>                                       learnt, but for the line end
    """
    start = tokenizer.special_tokens[chapter1.CHAT_START]
    end = tokenizer.special_tokens[chapter1.CHAT_END]
    newline = tokenizer.encode("\n")
    ids, learnt = [], []
    for message in messages:
        opening = [start, *tokenizer.encode(message["role"] + "\n")]
        said = [*tokenizer.encode(message["content"].strip()), end]    # marks typed in it stay text
        is_answer = message["role"] == "assistant"
        ids += opening + said + newline
        learnt += [False] * len(opening) + [is_answer] * len(said) + [False] * len(newline)
    return ids, learnt


def render_chat(tokenizer, messages):
    """Return the ids of a chat, ready for the assistant's next words."""
    ids, _ = encode_chat(tokenizer, messages)
    return ids + [tokenizer.special_tokens[chapter1.CHAT_START], *tokenizer.encode("assistant\n")]


def chat(model, tokenizer, config, ends):
    """Talk in the terminal until Ctrl-D. Past half a context, what is oldest is forgotten."""
    if tokenizer.special_tokens.get(chapter1.CHAT_END) not in ends:
        raise CourseError("this model has not learnt to chat: 06_finetune.py makes one that has")
    messages = []
    print("Ask away (/reset forgets what was said, Ctrl-D ends).")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return print()
        if not question:
            continue
        if question == "/reset":
            messages = []
            continue
        asked = messages + [{"role": "user", "content": question}]
        room = model.config.context // 2                       # the other half is for the answer
        while asked and len(ids := render_chat(tokenizer, asked)) > room:
            asked = asked[2:]                                  # the oldest question and its answer
        if not asked:
            print(f"(too long: with its marks, a question may have {room} tokens)")
            continue
        written = write(model, tokenizer, ids, config, ends)
        messages = asked + [{"role": "assistant", "content": tokenizer.decode(written)}]


# ---- The script ----------------------------------------------------------------------------------
@dataclass
class Config:
    model: str = ""  # folder that chapter 3 opens (default: out/base; to chat, out/chat)
    prompt: str = "class"  # text to go on from; no space at its end: most words bring their own
    max_tokens: int = 200  # tokens to write at most
    temperature: float = 0.8  # 0 takes the likeliest; 0.2 (to chat) is for answers, 0.8 for stories
    top_k: int = 0  # draw among the k likeliest only (0: all)
    top_p: float = 1.0  # draw among the likeliest with this probability (1: all; 0.95 is usual)
    samples: int = 1  # write so many texts after the same prompt: each draws other tokens
    seed: int = 1  # which random numbers the first text draws by; the others by seed + 1, + 2, ...
    chat: bool = False  # talk with it: /reset forgets, Ctrl-D ends
    explain: bool = False  # show the five likeliest tokens at each position, and the entropy
    heatmap: str = ""  # draw the attention over the prompt's tokens to this file
    device: str = ""  # cpu, cuda, mps (default: the fastest there is)
    out: str = "out"  # folder below which everything is written


def defaults_for(given):
    """Return the temperature to chat at: low, to be right rather than surprising; or complain."""
    for group in ("chat heatmap samples", "chat prompt"):
        found = sorted(given.keys() & group.split())
        if len(found) > 1:
            raise CourseError(f"these flags do nothing together: {', '.join(found)}")
    return {"temperature": 0.2} if given.get("chat") else {}


def main(config):
    """Talk, draw or go on with a text, as the flags say."""
    folder = config.model or Path(config.out, "chat" if config.chat else "base")
    model, tokenizer, ends = open_model(folder, chapter4.choose_device(config.device))
    if config.chat:
        return chat(model, tokenizer, config, ends)
    ids = tokenizer.encode(config.prompt)
    if tokenizer.start is not None:
        ids = [tokenizer.start, *ids]
    if not ids:
        raise CourseError("--prompt is empty: give the model a word to go on from")
    if config.heatmap:
        return draw_heatmap(model, tokenizer, ids, config.heatmap)
    data = chapter2.matching_tokens(Path(config.out, "data"), "train", tokenizer)
    for seed in range(config.seed, config.seed + config.samples):
        print(tokenizer.decode(ids), end="")
        start = time.perf_counter()
        written = write(model, tokenizer, ids, replace(config, seed=seed), ends)
        speed = len(written) / (time.perf_counter() - start)
        print(f"[seed {seed}: {len(written)} tokens, {speed:.0f} per second]")
        if len(data):
            longest = memorisation(written, data[:10_000_000])
            print(f"[copied from the training data: {longest} tokens at a stretch]")


# ---- Tools: opening a folder; many prompts, and the marks of a chat, for chapter 6 ---------------
def open_model(folder, device, context=0):
    """Return (model, tokenizer, ids that end a text) of a folder. Raises CourseError."""
    model = chapter3.GPT.load(folder, context).eval().to(device)
    tokenizer = chapter1.Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise CourseError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
                          f"{model.config.vocab_size}: they do not belong together")
    ends = tokenizer.end
    settings = Path(folder, "generation_config.json")
    if settings.exists():
        ends = chapter1.read_json(settings, "the script that made the model").get("eos_token_id")
    if not isinstance(ends, list):
        ends = [ends]
    return model, tokenizer, set(ends) - {None}


def generate_all(model, prompts, config, ends, vocab_size=None):
    """Return the new ids of each of the prompts, which may differ in length: each stops after one
    of `ends`, which it keeps, or max_tokens. Those of equal length are written together."""
    written = [[] for _ in prompts]
    for length in set(map(len, prompts)):
        group = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        unfinished = set(group)
        for new, _ in generate(model, [prompts[i] for i in group], config, vocab_size):
            for i, token in zip(group, new):
                if i in unfinished:
                    written[i].append(token)
                if token in ends:
                    unfinished.discard(i)
            if not unfinished:
                break
    return written


CHAT_TEMPLATE = (  # what encode_chat writes, as a Jinja template, for transformers
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def with_chat_tokens(model, tokenizer):
    """Return (model, tokenizer, tokens added): both know ChatML's marks, which GPT-2's do not."""
    marks = chapter1.SPECIAL_TOKENS[1:]
    missing = [text for text in marks if text not in tokenizer.special_tokens]
    if not missing:
        return model, tokenizer, missing
    more = [chapter1.special_json(text, i) for i, text in enumerate(missing, tokenizer.vocab_size)]
    data = {**tokenizer.data, "added_tokens": tokenizer.data["added_tokens"] + more}
    tokenizer = chapter1.read_tokenizer(data)
    V = max(tokenizer.vocab_size, model.config.vocab_size)
    grown = chapter3.GPT(replace(model.config, vocab_size=V)).eval()
    for new, old in zip(grown.state_dict().values(), model.state_dict().values()):
        new[:len(old)] = old                                   # `new` shares grown's memory
    print(f"added {missing} to the tokenizer and the embeddings")
    return grown, tokenizer, missing


if __name__ == "__main__":
    chapter1.run(main, Config, __doc__, defaults_for)
