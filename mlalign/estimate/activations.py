"""What autograd keeps of one row for the backward, tensor by tensor, in bytes.

T tokens, D width, A width of all query heads, K of all key heads, H heads, F inner width, r rank;
e bytes of the dtype. Of a frozen block with LoRA on all seven linears the backward keeps

    norms           2 x (T D float32 + T float32)    the input as float32, and 1 / rms
    their outputs   2 T D e                          what A of q, k, v and of gate, up reads
    attention       2 T A e + 2 T K e + T H float32  q, k, v, the result, the log-sum-exp
    MLP             4 T F e                          gate, act(gate), up, and their product
    adapters        7 T r e                          what B reads

and a first block whose input has no gradient keeps no first norm. Gemma 3 has four norms, each of
which keeps its gain besides (D float32, whatever the rows). Keys and values are repeated to
A where a mask is given and heads share them. Split attention keeps no T x T mask, but for each
block of completions after the first a small mask and, where prefix and block are joined, their keys
and values again; and the joined result besides its pieces. A frozen linear keeps nothing.
"""

from __future__ import annotations

from mlalign.estimate.geometry import Decoder, Geometry
from mlalign.estimate.plan import Plan, Tracked, track
from mlalign.estimate.rows import Rows

FLOAT = 4
"""Bytes of float32, in which norms and log-sum-exps are taken whatever the dtype."""
SPLIT_BLOCK = 256
"""Tokens of short completions that split attention takes in one call."""
INDEX = 8
"""Bytes of a token id."""


def saved(geometry: Geometry, plan: Plan) -> int:
    """Bytes kept at the end of the decoder's forward for all ``plan.pairs`` rows of completions;
    the head and the image features left out. Under checkpointing the blocks' inputs only."""
    decoder, tokens = geometry.decoder, plan.rows.tokens
    total, tracked = 0, plan.input_tracked
    rotary = mask = False
    for layer in range(decoder.layers):
        targets = _targets(plan, decoder, layer)
        seen = track(targets, tracked)
        rotary = rotary or seen.input or bool(targets & {"q_proj", "k_proj"})
        mask = mask or seen.attention
        if plan.checkpointing:
            total += tokens * decoder.width * plan.dtype_bytes
        else:
            total += block(decoder, plan, targets, seen)
        tracked = seen.output
    total += shared_by_blocks(decoder, plan, rotary=rotary, mask=mask)
    total += _norm(plan, tokens, decoder.width) if tracked else 0
    if plan.adapter is None:
        total += tokens * INDEX
    if plan.input_tracked:
        # Where the image features were scattered to: one bool per token.
        total += tokens
    return plan.pairs * total + _gains(decoder, plan)


def inside(geometry: Geometry, plan: Plan) -> int:
    """Bytes of the largest block, which checkpointing computes again one at a time."""
    decoder = geometry.decoder
    largest = 0
    for layer in range(decoder.layers):
        targets = _targets(plan, decoder, layer)
        largest = max(largest, block(decoder, plan, targets, track(targets, True)))
    return plan.pairs * largest


def block(decoder: Decoder, plan: Plan, targets: frozenset[str], seen: Tracked) -> int:
    """Bytes that one block keeps of one row of completions. ``seen``: what has a gradient."""
    tokens, size = plan.rows.tokens, plan.dtype_bytes
    inner = tokens * decoder.intermediate
    total = _norm(plan, tokens, decoder.width) if seen.input else 0
    total += _inputs(plan, tokens * decoder.width, targets & {"q_proj", "k_proj", "v_proj"})
    total += _attention(decoder, plan, targets, seen)
    norms = seen.middle * (2 if decoder.sandwiched else 1)
    norms += seen.output if decoder.sandwiched else 0
    total += norms * _norm(plan, tokens, decoder.width)
    total += _inputs(plan, tokens * decoder.width, targets & {"gate_proj", "up_proj"})
    total += inner * size * ((2 if seen.gate else 0) + (1 if seen.up else 0))
    total += _inputs(plan, inner, targets & {"down_proj"})
    if plan.adapter is not None:
        rank, sizes = plan.adapter.rank, decoder.linears
        total += len(targets) * tokens * rank * (plan.copy_bytes or size)
        # A's weight is kept for the gradient of its input only; cast once, whatever the rows.
        cast = sum(sizes[name][1] + sizes[name][0] * seen.reaches(name) for name in targets)
        total += cast * rank * plan.cast_bytes // plan.pairs
    return total


def features(geometry: Geometry, plan: Plan) -> int:
    """Bytes of the image features, and of what a trained projector keeps besides. No more tokens
    than the prefix has: of images of any size the geometry has the largest."""
    projector = geometry.projector
    tokens = min(plan.rows.tiles * projector.tokens, plan.rows.prefix)
    each = projector.tokens * projector.levels * geometry.decoder.width * plan.dtype_bytes
    if plan.projector or plan.adapter is None:
        each += projector.kept * plan.dtype_bytes + projector.kept_floats * FLOAT
    return plan.pairs * tokens * each // projector.tokens


def working(geometry: Geometry, plan: Plan) -> int:
    """Bytes that are alive at once, and not kept, in the backward of the last MLP: gradients of
    two inner activations and of the residual stream, before and after the norm."""
    decoder = geometry.decoder
    elements = 2 * decoder.intermediate + 2 * decoder.width
    return plan.pairs * plan.rows.tokens * elements * plan.dtype_bytes


def _targets(plan: Plan, decoder: Decoder, layer: int) -> frozenset[str]:
    """Linears of a block that keep their input: the adapted, or all where the weights train."""
    return frozenset(decoder.linears) if plan.adapter is None else plan.adapter.of(layer)


def shared_by_blocks(
    decoder: Decoder, plan: Plan, *, rotary: bool = True, mask: bool = True
) -> int:
    """cos and sin, and the additive mask, of which all blocks of a kind keep the same."""
    rows, size = plan.rows, plan.dtype_bytes
    kinds = len(set(decoder.windows)) or 1
    total = kinds * 2 * rows.tokens * decoder.head_dim * size if rotary else 0
    if mask and plan.attention == "dense":
        total += kinds * sum(length**2 for length in rows.lengths) * size
    return total


def _norm(plan: Plan, tokens: int, width: int) -> int:
    """An RMS norm over ``width``: its input and 1 / rms; where it trains, its output before the
    weight too."""
    own = plan.dtype_bytes if plan.adapter is None else 0
    return tokens * (width * (FLOAT + own) + FLOAT)


def _gains(decoder: Decoder, plan: Plan) -> int:
    """1 + weight of every norm, in float32, which Gemma 3 makes anew in each pass."""
    if not decoder.sandwiched or plan.checkpointing:
        return 0
    each = 4 * decoder.width + 2 * decoder.head_dim
    return (decoder.layers * each + decoder.width) * FLOAT


def _inputs(plan: Plan, elements: int, targets: frozenset[str]) -> int:
    """The input of linears that read the same tensor: kept once, or a copy for each."""
    if plan.copy_bytes:
        return len(targets) * elements * plan.copy_bytes
    return elements * plan.dtype_bytes if targets else 0


def _attention(decoder: Decoder, plan: Plan, targets: frozenset[str], seen: Tracked) -> int:
    tokens, size = plan.rows.tokens, plan.dtype_bytes
    result = tokens * decoder.attention_width
    if not seen.attention:
        return _inputs(plan, result, targets & {"o_proj"})
    # A mask keeps SDPA from serving several query heads with one key head.
    masked = decoder.attention_width if decoder.kv_heads < decoder.heads else decoder.kv_width
    pairs = masked if plan.attention == "dense" else decoder.kv_width
    total = (2 * result + 2 * tokens * pairs) * size + tokens * decoder.heads * FLOAT
    if plan.attention == "split":
        for between, length in _blocks(plan.rows):
            joined = plan.cuda or between > plan.rows.prefix
            keys = plan.rows.prefix + length + (0 if joined else between)
            # Heads that share keys are given copies of them under a mask.
            copied = joined or masked > decoder.kv_width
            total += (2 * keys * masked * copied + length * keys) * size
    several = plan.attention == "split" and (len(plan.rows.completions) > 1 or plan.pairs > 1)
    if several or plan.copy_bytes:
        total += _inputs(plan, result, targets & {"o_proj"})
    if decoder.normed_heads:
        for name, heads in (("q_proj", decoder.heads), ("k_proj", decoder.kv_heads)):
            if seen.input or name in targets:
                total += heads * _norm(plan, tokens, decoder.head_dim)
    return total


def _blocks(rows: Rows) -> list[tuple[int, int]]:
    """(tokens between prefix and block, tokens of the block) of each call of split attention that
    has a mask: the completions after a shared row's first, short ones together."""
    blocks: list[tuple[int, int]] = []
    place = rows.completions[0]
    for length in rows.completions[1:] if rows.layout == "shared" else ():
        if blocks and blocks[-1][1] + length <= SPLIT_BLOCK:
            blocks[-1] = blocks[-1][0], blocks[-1][1] + length
        else:
            blocks.append((place, length))
        place += length
    return blocks
