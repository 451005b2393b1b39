"""A tiny trainer's configuration, its verifier, and its loss on plain logits."""

import torch

from sg_opd import SGOPDConfig, SGOPDTrainer

RATE = 0.05
LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def coin_verifier(prompts, completions, completion_ids, **kwargs):
    """Correct, incorrect or abstained by the ids alone, so that teacher rollouts of random models can be endorsed."""
    return [(1.0, 0.0, None, 1.0, 0.0)[sum(ids) % 5] for ids in completion_ids]


class Recorder(SGOPDTrainer):
    """Keeps each micro-batch as the loss got it, and the loss."""

    def __init__(self, *args, **kwargs):
        self.batches, self.losses = [], []
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        self.batches.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
        loss = super()._compute_loss(model, inputs)
        self.losses.append(loss.item())
        return loss


def make_config(tmp_path, **overrides):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 16,
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "temperature": 0.8,
        "preset": "sg-opd-lite",
        "teacher_phase_steps": 0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **overrides,
    }
    if settings.get("estimator") == "top_k":
        settings.setdefault("teacher_top_k", 5)  # the default is more than there are ids here
    return SGOPDConfig(**settings)


MIXED = {"teacher_phase_steps": 10, "teacher_phase_fraction": 0.5, "teacher_candidates": 32}


def plain_logits(model, batch):
    """Logits of the completion's positions from the model's own forward, (B, T, V)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return model(input_ids=ids, attention_mask=mask).logits[:, -batch["completion_ids"].size(1) - 1 : -1]


def expected_loss(student, teacher, reference, batch, loss_fn, divisor, nll, **of_rows):
    """SignGatedLoss on plain logits; with `nll`, teacher rows by maximum likelihood instead."""
    logits = plain_logits(student, batch)
    with torch.no_grad():
        teacher_logits = plain_logits(teacher, batch)
        reference_logits = None if reference is None else plain_logits(reference, batch)
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    taught = batch["from_teacher"] & nll
    gated = mask * ~taught.unsqueeze(1)
    loss = loss_fn(
        logits, teacher_logits, ids, batch["verifier_labels"], gated, reference_logits, divisor, **of_rows
    ).loss
    logps = (logits.float() / loss_fn.settings.temperature).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return loss - (logps * mask * taught.unsqueeze(1)).sum() / divisor


def assert_same_weights(model, expected, tolerance=2e-6):
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def sgd_step(model, losses):
    """One step of plain SGD on the sum of losses, for what is trained."""
    model.zero_grad()
    sum(losses).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= RATE * parameter.grad


def assert_same_weights_exactly(model, other):
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert a.equal(b), name


def decided(model, teacher, batch, temperature=0.8):
    """log pi_S, A_t and its factor in the first update, by hand: 1.8 where teacher and verdict agree, else 1."""
    ids = batch["completion_ids"].unsqueeze(-1)
    student, taught = (
        (plain_logits(m, batch).float() / temperature).log_softmax(-1).gather(-1, ids).squeeze(-1)
        for m in (model, teacher)
    )
    delta = (taught - student).detach()
    side = torch.where(batch["verifier_labels"] == 1, 1.0, torch.where(batch["verifier_labels"] == 0, -1.0, 0.0))
    factor = torch.where(side.unsqueeze(1) * delta > 0, 1.8, 1.0)
    return student, factor * delta, factor
