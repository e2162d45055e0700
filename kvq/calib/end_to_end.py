"""Learn transforms of all layers together, on the logits of the whole model (SpinQuant, arXiv 2405.16406).

The model's weights stand still. Every layer's keys and values go through their transforms and a fake-quantized codec,
with gradients, under the recipe's token policy; the loss is KL(model || model with the recipe's cache) per token.
SpinQuant minimises the cross-entropy instead, which also rewards fitting the text. What was learned layer by layer is
where this begins.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvq.cache.model_attention import kvq_attention, options_of
from kvq.calib.fit_source import FitSource
from kvq.calib.learn import fit_name, learned_steps
from kvq.calib.run_state import save_learned, saved_learned
from kvq.calib.stats import Fit, Stats
from kvq.codecs import Codec
from kvq.errors import DataError
from kvq.heads import HeadSpec
from kvq.models.decoder import telling
from kvq.models.describe import describe
from kvq.models.rope import Rope
from kvq.pages.layout import SIDES
from kvq.recipe import Recipe
from kvq.transforms import Chain, Step, build_chain
from kvq.transforms.fit import fit_steps
from kvq.transforms.frame import Frame, block_origins
from kvq.transforms.learned import Learnable, composed, cosine

NAME = "kvq_end_to_end"
OBJECTIVE = "logits"
DEFAULT_STEPS = 100
# Tokens of a text that one step sees; SpinQuant takes 2,048 of eight texts.
TOKENS = 256
# Steps between two saved states.
SAVE_STEPS = 10


@dataclass
class _Layer:
    """What a layer's attention does while its transforms are learned.

    fixed       steps by side and place; learnables: those that are learned on, by side and place.
    """

    spec: HeadSpec
    codecs: dict[str, Codec]
    rope: Rope | None = None
    fixed: dict[str, Sequence[Step]] = field(default_factory=dict)
    learnables: dict[tuple[str, int], Learnable] = field(default_factory=dict)
    begun: dict[tuple[str, int], dict[str, torch.Tensor]] = field(default_factory=dict)

    def chain(self, side: str) -> Chain:
        steps = []
        for place, step in enumerate(self.fixed[side]):
            steps.append(step)
            if (side, place) in self.learnables:
                steps.append(self.learnables[side, place].step())
        return Chain(tuple(steps))


_ACTIVE: dict[int, _Layer] = {}


def learn_end_to_end(
    model: PreTrainedModel,
    recipe: Recipe,
    stats: Stats,
    tokens: torch.Tensor,
    folder: Path,
    *,
    state_folder: Path,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """The statistics with end-to-end fits for every learned step of a recipe.

    tokens         int64 [N, T], texts to learn on; T at least 2.
    state_folder   where the state is kept every few steps: an interrupted call continues there, and ends alike.
    progress       called with (steps done, steps in all).

    Raises DataError if a loss is not finite.
    """
    spec = describe(model.config)
    layers = _layers(recipe, spec, stats, folder)
    learnables = {
        f"{index}.{side}.{place}": learnable
        for index, layer in layers.items()
        for (side, place), learnable in layer.learnables.items()
    }
    if not learnables:
        return stats
    facts = {
        "recipe": recipe.hash,
        "steps": steps,
        "seed": seed,
        "stats": stats.provenance(),
        "begun": sorted(stats.fits),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + tokens.contiguous().numpy().tobytes())
    state = state_folder / f"end-to-end-{recipe.hash[:16]}.safetensors", digest.hexdigest()
    losses = _resume(*state, learnables)
    if progress:
        progress(len(losses), steps)
    parameters = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        for count in range(len(losses), steps):
            # The exact forward and the one that is learned on.
            with telling(model, 2):
                losses.append(_step(model, layers, _text(tokens, seed, count)))
            for learnable in learnables.values():
                learnable.descend(cosine(count, steps))
            if (count + 1) % SAVE_STEPS == 0:
                _save(*state, learnables, losses)
            if progress:
                progress(count + 1, steps)
    except KeyboardInterrupt:
        _save(*state, learnables, losses)
        raise
    finally:
        for parameter, needed in zip(model.parameters(), parameters):
            parameter.requires_grad_(needed)
    return _with_fits(stats, recipe, spec, layers, losses, seed)


def _layers(recipe: Recipe, spec, stats: Stats, folder: Path) -> dict[int, _Layer]:
    """Every quantized layer with its fixed steps; learned steps begin where block-wise learning ended."""
    source, found = FitSource(spec, stats, folder), {}
    for layer in spec.full_layers:
        head = recipe.for_head(layer.index, 0, len(spec.layers))
        if head.is_exact:
            continue
        codecs = {s: getattr(head, s).stand_in(head.stored_dim(s, layer.head_dim), layer.kv_heads) for s in SIDES}
        own = _Layer(spec=head, codecs=codecs)
        for side in SIDES:
            specs = getattr(head.transforms, side)
            data = source.fit_data(layer, side, head, codecs[side])
            own.rope = data.rope

            def begin(place, seen, side=side, specs=specs, own=own, index=layer.index):
                learnable = specs[place].learnable(seen)
                prefix = f"{index}.{side}.{place}."
                fit = stats.fits.get(fit_name(own.spec, side, place))
                held = {
                    n.removeprefix(prefix): t for n, t in (fit.tensors if fit else {}).items() if n.startswith(prefix)
                }
                own.learnables[side, place] = learnable
                own.begun[side, place] = held or {n: t.detach() for n, t in learnable.numbers().items()}
                return own.begun[side, place]

            tensors, _ = fit_steps(specs, data, begin, **head.framing(side))
            own.fixed[side] = build_chain(specs, layer.head_dim, tensors).steps
        found[layer.index] = own
    return found


def _text(tokens: torch.Tensor, seed: int, count: int) -> torch.Tensor:
    """The text of one step, [1, T]; a function of seed and step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + count)
    row = tokens[int(torch.randint(len(tokens), (1,), generator=generator))]
    return row[:TOKENS].unsqueeze(0)


def _step(model: PreTrainedModel, layers: dict[int, _Layer], tokens: torch.Tensor) -> float:
    """Gradients of one text's loss; returns the loss, nats a token."""
    tokens = tokens.to(model.device)
    with torch.no_grad():
        exact = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), dim=-1)
    with _attending(model, layers):
        found = torch.log_softmax(model(input_ids=tokens, use_cache=False).logits.float(), dim=-1)
    loss = (exact.exp() * (exact - found)).sum(-1).mean()
    if not bool(loss.isfinite()):
        raise DataError("the loss is NaN or infinite: calibrate in float32, or with fewer steps.")
    loss.backward()
    return float(loss.detach())


@contextmanager
def _attending(model: PreTrainedModel, layers: dict[int, _Layer]) -> Iterator[None]:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _ACTIVE.update(layers)
    try:
        yield
    finally:
        _ACTIVE.clear()
        model.set_attn_implementation(previous)


def _attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    layer = _ACTIVE.get(getattr(module, "layer_idx", None))
    if layer is None:
        return kvq_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    options = options_of(module, query, scaling, kwargs)
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    stored = {side: _stored(layer, side, x) for side, x in zip(SIDES, (key, value))}
    grouped = query.unflatten(1, (-1, groups)).flatten(2, 3)

    def scores(keys: torch.Tensor) -> torch.Tensor:
        found = (grouped @ keys.transpose(-1, -2)).unflatten(2, (groups, tokens)) * options.scaling
        return found if options.softcap is None else options.softcap * torch.tanh(found / options.softcap)

    position = torch.arange(tokens, device=query.device)
    # A query reads its own token exactly: it is packed after the step's attention.
    read = (position < position.unsqueeze(1) - layer.spec.tokens.window) & (position >= layer.spec.tokens.sinks)
    logits = torch.where(read, scores(stored["key"]), scores(key))
    logits = logits.masked_fill(position > position.unsqueeze(1), -torch.inf)
    if options.sink_logits is not None:
        sink = options.sink_logits.view(1, -1, groups, 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, sink.to(logits.dtype)], dim=-1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    out = (weights * ~read).flatten(2, 3) @ value + (weights * read).flatten(2, 3) @ stored["value"]
    return out.unflatten(2, (groups, tokens)).flatten(1, 2).transpose(1, 2).contiguous(), None


def _stored(layer: _Layer, side: str, x: torch.Tensor) -> torch.Tensor:
    """What packed tokens of x [B, K, T, D] are read as, in the model's basis."""
    codec, chain = layer.codecs[side], layer.chain(side)
    first = min(layer.spec.tokens.sinks, x.shape[2])
    whole = first + (x.shape[2] - first) // codec.block_tokens * codec.block_tokens
    body, block = x[:, :, first:whole], layer.spec.frame_tokens if side == "key" and layer.spec.framed_steps else None
    if block is None:
        decoded = chain.inverse(codec.fake_quantized(chain.forward(body)))
    else:
        # Steps before those of the frame commute with RoPE.
        origins = block_origins(torch.arange(first, whole).unsqueeze(0), block)
        frame = Frame(rope=layer.rope, block=block, heads=x.shape[1], head_dim=x.shape[3], chain=chain)
        decoded = frame.leave(codec.fake_quantized(frame.enter(body, origins)), origins)
    return torch.cat([x[:, :, :first], decoded, x[:, :, whole:]], dim=2)


def _save(path: Path, run: str, learnables: dict[str, Learnable], losses: list[float]) -> None:
    """The state of an unfinished run in one file, written whole or not at all."""
    tensors = {f"{n}/{part}": x.contiguous() for n, own in learnables.items() for part, x in own.state().items()}
    save_learned(path, run, tensors, losses)


def _resume(path: Path, run: str, learnables: dict[str, Learnable]) -> list[float]:
    """Take up an earlier state; returns its losses, none if there is no state of this run."""
    tensors, losses = saved_learned(path, run) or ({}, [])
    for name, learnable in learnables.items() if losses else ():
        learnable.restore({n.removeprefix(f"{name}/"): x for n, x in tensors.items() if n.startswith(f"{name}/")})
    return losses


def _with_fits(stats: Stats, recipe: Recipe, spec, layers: dict[int, _Layer], losses: list[float], seed: int) -> Stats:
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for layer, side, head, place in learned_steps(recipe, spec):
        own = layers[layer.index]
        learned = {n: t.detach() for n, t in own.learnables[side, place].numbers().items()}
        numbers = composed(own.begun[side, place], learned)
        name = fit_name(head, side, place, recipe.hash)
        held = tensors.setdefault(name, {})
        held |= {f"{layer.index}.{side}.{place}.{n}": t.contiguous() for n, t in numbers.items()}
    facts = {"objective": OBJECTIVE, "recipe": recipe.name, "losses": [round(loss, 8) for loss in losses], "seed": seed}
    for name, own in tensors.items():
        stats = stats.with_fit(name, Fit(tensors=own, facts=facts))
    return stats
