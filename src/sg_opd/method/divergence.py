"""The full estimator on hidden states and heads, in chunks on TRL's kernel: never whole logits.

Both distributions are renormalised over the ids that student and target share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

REVERSE_KL = 1.0  # the kernel's beta for KL(student || target)
BLOCK = 256  # positions whose tokens' logits are one product: few against the ids of a vocabulary, and so cheap


class Head(NamedTuple):
    """A language-model head, `softcap * tanh(scale * (W h + b) / softcap)`, with W of shape (V, H)."""

    weight: Any  # a tensor; where ZeRO-3 shards it, a parameter
    bias: Any = None
    scale: float = 1.0
    softcap: float | None = None


class Divergence(NamedTuple):
    """Per position, shape (N,): `divergence` has a gradient to the student, the others have none; in nats."""

    divergence: Tensor
    entropy: Tensor
    student_logps: Tensor
    target_logps: Tensor


def vocabulary(head: Head) -> int:
    """The number of ids of a head; ZeRO-3 leaves an empty weight, and its shape beside it."""
    return getattr(head.weight, "ds_shape", head.weight.shape)[0]


def head_of(model: PreTrainedModel) -> Head:
    """The head of a model, with the scaling its configuration declares (Cohere, Falcon-H1, Granite, Gemma, ...)."""
    head: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    multipliers = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = math.prod(getattr(config, name, None) or 1.0 for name in multipliers)
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return Head(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))


def sequence(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of a batch's prompts with their completions, both (B, P + T)."""
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    return ids, mask


def last_hidden_state(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
    """The backbone's output at the positions that predict the last `keep` tokens, (B, keep, H)."""
    whole: Any = getattr(model, "get_base_model", lambda: model)()  # of an adapter
    output = whole.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return output.last_hidden_state[:, -keep - 1 : -1]


def chunked_divergence(
    student_hidden: Tensor, student: Head, target_hidden: Tensor, target: Head, ids: Tensor, temperature: float
) -> Divergence:
    """KL(student || target) at each position, and both log-probabilities of the sampled token, from one pass.

    Hidden states are (N, H), sampled ids (N,) and below both vocabularies; the gradient goes to the student's states
    and head. Must run inside the student wrapper's forward, where a sharded head is gathered.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    shared = min(vocabulary(student), vocabulary(target))
    if shared < vocabulary(student):  # the kernel runs over the student's ids
        bias = None if student.bias is None else _first_rows(student.bias, shared)
        student = student._replace(weight=_first_rows(student.weight, shared), bias=bias)
    with torch.enable_grad():  # the normalisers are read off the graph, which a pass without gradient drops again
        if not (student_hidden.requires_grad or student.weight.requires_grad):
            student_hidden = student_hidden.detach().requires_grad_()
        both = student_hidden, student.weight, student.bias, target_hidden, target.weight, target.bias
        scaling = student.scale, student.softcap, target.scale, target.softcap
        divergence, entropy = ChunkedDivergenceFunction.apply(*both, REVERSE_KL, temperature, *scaling)
    student_log_z, target_log_z = divergence.grad_fn.saved_tensors[6:8]
    with torch.no_grad():
        student_logps = _token_logits(student_hidden, student, ids, temperature) - student_log_z
        target_logps = _token_logits(target_hidden, target, ids, temperature) - target_log_z
    return Divergence(divergence, entropy, student_logps, target_logps)


def chunked_nll(hidden: Tensor, head: Head, ids: Tensor, temperature: float) -> Tensor:
    """`-log pi(y)` of each position's token over the whole head, (N,), with gradient; inside the wrapper's forward."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE

    with gathered(head.weight, head.bias):
        logps, *_ = ChunkedLogProbFunction.apply(
            hidden, head.weight, head.bias, ids, temperature, VOCAB_CHUNK_SIZE, head.softcap, head.scale, ()
        )
    return -logps


def check_linear(*heads: Head) -> None:
    """Refuse soft-capped heads: their logits are no linear map of the hidden state."""
    if any(head.softcap is not None for head in heads):
        raise ValueError(
            "estimator='full' with reference_policy='initial' needs plain linear heads, but this model soft-caps its "
            "logits (`final_logit_softcapping`). Use reference_policy='current' or estimator='sampled'."
        )


def tilted_target(
    teacher_hidden: Tensor, teacher: Head, reference_hidden: Tensor, reference: Head, factor: Tensor
) -> tuple[Tensor, Head]:
    """`pi_R^(1 - lambda) * pi_T^lambda / Z` as one linear head on concatenated hidden states (N, H_t + H_r) [G, O].

    Its logits are `lambda * z_T + (1 - lambda) * z_R` with the `factor` lambda, (N,): one projection of
    `[lambda h_T, (1 - lambda) h_R]`, in which the biases are two more columns.
    """
    check_linear(teacher, reference)
    shared = min(vocabulary(teacher), vocabulary(reference))
    hidden, columns = [], []
    with torch.no_grad(), gathered(teacher.weight, teacher.bias, reference.weight, reference.bias):
        for states, head, weight in (
            (teacher_hidden, teacher, factor * teacher.scale),
            (reference_hidden, reference, (1 - factor) * reference.scale),
        ):
            weight = weight.unsqueeze(1).to(states.dtype)
            hidden.append(weight * states)
            columns.append(head.weight[:shared].to(states.dtype))
            if head.bias is not None:
                hidden.append(weight)
                columns.append(head.bias[:shared, None].to(states.dtype))
        return torch.cat(hidden, dim=1), Head(_whole(torch.cat(columns, dim=1)), None)


class Target(NamedTuple):
    """A teacher's states for its `rows` of a batch, (B', T, H), with its head; `None` is all rows."""

    states: Tensor
    head: Head
    rows: list[int] | None = None


def full_per_token(
    student_states: Tensor,
    student: Head,
    targets: Sequence[Target],
    ids: Tensor,
    gated: Tensor,
    temperature: float,
    decide: Callable[[Tensor, Tensor], Tensor],
    reference: tuple[Tensor, Head] | None = None,
    taught: Tensor | None = None,
    taught_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss and student entropy of each position, both (B, T), zero where not trained.

    `gated` tokens are trained by the gated divergence from the one of `targets` whose row it is, `taught` ones by
    maximum likelihood times `taught_weight`; both masks are (B, T), all states (B, T, H), H each model's own. `decide`
    takes the student's and the teacher's log-probabilities of `ids` to the gate's factors, all (B, T). `reference` is
    states and head of the initial policy; `None` is the current one. Every rank must have as many targets.
    """
    student = unsharded(student)
    given = reference and (reference[0], unsharded(reference[1]))
    passes = [_first_pass(student_states, student, target, ids, gated, temperature, given) for target in targets]
    logps = (
        [spread(logps, found.mask) for logps in (found.current.student_logps, found.current.target_logps)]
        for found in passes
    )
    both: Any = map(sum, zip(*logps, strict=True))
    factor = decide(*both)
    losses: list[Any] = []
    for found in passes:
        at = taken(factor, found.at)
        if given is None:
            divergence = at * found.current.divergence
        else:
            tilted = tilted_target(found.states, found.head, taken(given[0], found.at), given[1], at)
            states = taken(student_states, found.at), student
            divergence = chunked_divergence(*states, *tilted, taken(ids, found.at), temperature).divergence
        losses.append(spread(divergence, found.mask))
    if taught is not None:
        losses.append(taught_per_token(student_states, student, ids, taught, taught_weight, temperature))
    entropy: Any = sum(spread(found.current.entropy, found.mask) for found in passes)
    return sum(losses), entropy


class _Pass(NamedTuple):
    """What `_first_pass` found at a teacher's trained tokens: their `mask` (B, T), places, states and divergence."""

    mask: Tensor
    at: Tensor
    states: Tensor
    head: Head
    current: Divergence


def _first_pass(
    student_states: Tensor,
    student: Head,
    target: Target,
    ids: Tensor,
    gated: Tensor,
    temperature: float,
    reference: Any,
) -> _Pass:
    head, mask, own = unsharded(target.head), gated, gated
    if target.rows is not None:
        own = gated[target.rows]
        mask = torch.zeros_like(gated)
        mask[target.rows] = own
    at = places(mask)
    states = taken(student_states, at)
    # under the initial reference this pass only decides, and the next one is differentiated
    states = states if reference is None else states.detach()
    targets = taken(target.states, places(own))
    return _Pass(
        mask, at, targets, head, chunked_divergence(states, student, targets, head, taken(ids, at), temperature)
    )


def taught_per_token(
    states: Tensor, head: Head, ids: Tensor, taught: Tensor, weight: float, temperature: float
) -> Tensor:
    """`weight` times the negative log-likelihood of the tokens `taught`, (B, T), zero elsewhere; states (B, T, H)."""
    at = places(taught)
    return spread(weight * chunked_nll(taken(states, at), head, taken(ids, at), temperature), taught)


def places(mask: Tensor) -> Tensor:
    """Where `mask` (B, T) is true, for `taken`; the host waits for the device here, as for each `values[mask]`."""
    return mask.flatten().nonzero().squeeze(1)


def taken(values: Tensor, at: Tensor) -> Tensor:
    """`values` (B, T, ...) at N places, (N, ...)."""
    return values.flatten(0, 1).index_select(0, at)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (N,) at the N true places of `mask` (B, T), zero elsewhere; keeps the graph where N is 0."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def put(values: Tensor, mask: Tensor) -> Tensor:
    """As `spread`, of `values` (N, ...): (B, T, ...), without gradient."""
    whole = values.new_zeros(mask.numel(), *values.shape[1:])
    return whole.index_copy_(0, places(mask), values).view(*mask.shape, *values.shape[1:])


def unsharded(head: Head) -> Head:
    """The head with plain tensors in place of FSDP2's DTensors; every rank must call it equally often.

    Refuses a trained head that stays sharded within the forward, since other ranks' gradients would be lost.
    """
    if not isinstance(head.weight, DTensor):
        return head
    if head.weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "estimator='full' or 'top_k' under FSDP needs the student's head in the group of the whole model or of its "
            "last norm, as accelerate makes them; take the head out of `fsdp_config['transformer_layer_cls_to_wrap']`."
        )
    bias = head.bias.full_tensor() if isinstance(head.bias, DTensor) else head.bias
    return head._replace(weight=head.weight.full_tensor(), bias=bias)


def _first_rows(parameter: Tensor, rows: int) -> Tensor:
    """`parameter[:rows]`; of one that ZeRO-3 shards, a whole copy that lives until the backward pass."""
    if not hasattr(parameter, "ds_status"):
        return parameter[:rows]
    return _whole(_GatheredRows.apply(parameter, rows))


class _GatheredRows(torch.autograd.Function):
    """The first rows of a parameter that ZeRO-3 shards; its gradient arrives in the parameter's own shape.

    Autograd's own slice would not do: the parameter is empty again when its gradient comes.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Any, rows: int) -> Tensor:
        with gathered(parameter):
            ctx.shape = parameter.shape
            return parameter[:rows].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        whole = gradient.new_zeros(ctx.shape)
        whole[: len(gradient)] = gradient
        return whole, None


def _whole(tensor: Tensor) -> Tensor:
    """`tensor`, marked as gathered: under ZeRO-3 the kernel asks every head for its status."""
    if is_deepspeed_zero3_enabled():
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        tensor.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    return tensor


def _token_logits(hidden: Tensor, head: Head, ids: Tensor, temperature: float) -> Tensor:
    """The scaled logit of one id a position, from matrix products as the kernel's.

    A dot product of its own would be rounded otherwise than the logit in the kernel's normaliser, and where a token is
    nearly certain that difference is all that is left of its log-probability.
    """
    from trl.kernels.chunked_divergence import _compute_dtype, _project
    from trl.kernels.chunked_logprob import _torch_transform

    dtype, blocks = _compute_dtype(hidden), max(1, math.ceil(len(ids) / BLOCK))
    logits = []
    with gathered(head.weight, head.bias):
        for states, of in zip(hidden.to(dtype).tensor_split(blocks), ids.tensor_split(blocks), strict=True):
            square = torch.empty(len(of), len(of), dtype=torch.float32, device=hidden.device)
            bias = None if head.bias is None else head.bias[of]
            _project(square, states, head.weight[of], bias, 0, len(of), dtype)
            logits.append(square.diagonal())
    softcap = 1.0 if head.softcap is None else head.softcap
    return _torch_transform(torch.cat(logits), head.scale, softcap, 1 / temperature, head.softcap is not None)


def gathered(*parameters: Any) -> Any:
    """A context in which parameters that ZeRO-3 shards are whole; `None` among them is passed over."""
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)
