"""`teacher_offload`: where the teacher's blocks are at any moment, and that nothing else changes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig
from scoring import BITS, COMPLETIONS, PROMPTS, SIZES, Countdown
from trainers import MIXED, Recorder, coin_verifier, make_config
from transformers import GPT2Config, GPT2LMHeadModel

from sg_opd import SGOPDTrainer
from sg_opd.teachers import local
from sg_opd.teachers.local import BlockOffload, blocks_of, load_teacher
from sg_opd.training.checks import check_offload

PADDED = {"vocab_size": 40, "hidden_size": 48, "tie_word_embeddings": True}  # the student's vocabulary has 27


def on_meta(module):
    """Whether all, none (False) or some (None) of a module's parameters are on the meta device."""
    metas = {parameter.is_meta for parameter in module.parameters()}
    return metas.pop() if len(metas) == 1 else None


def watch(model):
    """Before each forward of a decoder layer, as a list that grows: which layers are materialised."""
    layers, seen = model.model.layers, []
    for i, layer in enumerate(layers):

        def look(module, inputs, i=i):
            seen.append((i, [on_meta(other) for other in layers]))

        layer.self_attn.register_forward_pre_hook(look)  # within the layer's own hook
    return seen


@pytest.fixture
def run(make_model, tokenizer, dataset, tmp_path):
    """A run of three steps with a teacher phase in them: the trainer, and the student's weights."""

    def run(offload, peft_config=None, teacher=None, resume=None, **overrides):
        settings = {"max_steps": 3, "teacher_offload": offload, **MIXED, **overrides}
        trainer = Recorder(
            make_model(1), teacher or make_model(2, **PADDED), coin_verifier, make_config(tmp_path, **settings),
            dataset, processing_class=tokenizer, peft_config=peft_config,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def assert_same_run(ours, other):
    assert ours.losses == other.losses
    assert len(ours.batches) == len(other.batches) > 0
    for got, want in zip(ours.batches, other.batches, strict=True):
        assert got["completion_ids"].equal(want["completion_ids"])
        for name in ("teacher_per_token_logps", "teacher_top_ids", "teacher_top_logps"):
            assert (name in got) == (name in want)
            assert name not in want or got[name].equal(want[name])
    names = ("loss", "grad_norm", "gate/consensus", "delta/p05", "delta/p95")
    assert all(name in ours.state.log_history[0] for name in names)
    for got, want in zip(ours.state.log_history, other.state.log_history, strict=True):
        assert [got.get(name) for name in names] == [want.get(name) for name in names]
    for (name, got), want in zip(ours.model.named_parameters(), other.model.parameters(), strict=True):
        assert got.equal(want), name
        assert got.requires_grad == want.requires_grad


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora-bf16"])
@pytest.mark.parametrize("estimator", ["sampled", "full", "top_k"])
def test_a_run_is_the_same_bit_for_bit(estimator, lora, run, monkeypatch):
    """Scores, losses, gradient norms and weights of three steps with a teacher phase, tied and padded embeddings,
    gradient checkpointing and the initial reference, fp32 and bf16 autocast; scored by micro-batches, as without
    offload."""
    monkeypatch.setattr(local, "TOKENS_AT_ONCE", 1)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    settings = {"estimator": estimator, "gradient_checkpointing": True, "reference_policy": "initial", "bf16": lora}
    plain, offloaded = (run(offload, adapter, **settings) for offload in (False, True))
    assert any(batch["from_teacher"].any() for batch in plain.batches)
    assert_same_run(offloaded, plain)
    assert all(on_meta(block) is True for block in offloaded.teacher.offload.blocks)
    assert plain.teacher.offload is None


@pytest.mark.parametrize("estimator", ["sampled", "full", "top_k"])
def test_one_pass_of_blocks_scores_all_micro_batches(estimator, make_model, run):
    """Two micro-batches of four rows a step: without a teacher phase three steps are three passes, not six.

    Two passes more are before the first step, where the head is tried.
    """
    watched = make_model(2, **PADDED)
    seen = watch(watched)
    offloaded = run(True, teacher=watched, estimator=estimator, teacher_phase_steps=0)
    assert [layer for layer, _ in seen] == [0, 1] * (2 + 3)
    for layer, metas in seen:
        assert metas == [i != layer for i in range(2)]
    plain = run(False, estimator=estimator, teacher_phase_steps=0)
    assert offloaded.losses == pytest.approx(plain.losses, rel=1e-5, abs=1e-7)
    for got, want in zip(offloaded.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_device_with_an_index_keeps_parameters(make_model):
    """ "cpu:0" is what accelerate gives a rank on the CPU."""
    model = make_model(2)
    offload = BlockOffload(model, torch.device("cpu:0"))
    for _ in range(2):
        with offload.lent():
            assert all(isinstance(block.mlp.up_proj.weight, torch.nn.Parameter) for block in offload.blocks)


def test_proposals_have_the_whole_teacher_and_give_it_back(make_model, run, monkeypatch):
    model = make_model(2, **PADDED)
    trainer = run(True, teacher=model, max_steps=1)
    seen = watch(model)
    assert len(trainer.teacher.propose(PROMPTS, candidates=2)) == len(PROMPTS)
    assert len(seen) >= 2 * 2
    assert all(metas == [False, False] for _, metas in seen)
    assert [on_meta(layer) for layer in model.model.layers] == [True, True]

    def fail(*args, **kwargs):
        assert [on_meta(layer) for layer in model.model.layers] == [False, False]
        raise RuntimeError("out of luck")

    monkeypatch.setattr(model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.teacher.propose(PROMPTS)
    assert [on_meta(layer) for layer in model.model.layers] == [True, True]
    del seen[:]
    trainer.teacher.score(PROMPTS, COMPLETIONS)  # streams again, though the model was lent
    assert [metas for _, metas in seen] == [[False, True], [True, False]]


def test_a_block_that_does_not_come_is_sent_back_with_the_others(make_model):
    """The middle one of three fails half way, as where the device is full while the teacher is lent."""
    offload = BlockOffload(make_model(2, num_hidden_layers=3), torch.device("cpu"))
    del offload.hooks[1].weights_map["mlp.up_proj.weight"]
    with pytest.raises(KeyError, match=r"mlp\.up_proj"), offload.lent():
        pass
    assert [on_meta(block) for block in offload.blocks] == [True] * 3
    assert all(hook.offload for hook in offload.hooks)


def test_a_given_model_still_answers_and_comes_back_whole(make_model, run):
    """The caller's object is changed: its blocks rest on the meta device, its forward brings them, and accelerate's
    `remove_hook_from_submodules` gives back the very weights. What stays on the device keeps its ties."""
    model, original = make_model(2, **PADDED), make_model(2, **PADDED)
    run(True, teacher=model, max_steps=1)
    assert [on_meta(layer) for layer in model.model.layers] == [True, True]
    stay = [model.model.embed_tokens, model.model.norm, model.lm_head]
    assert not any(map(on_meta, stay))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert model(input_ids=ids).logits.equal(original(input_ids=ids).logits)
    remove_hook_from_submodules(model)
    for got, want in zip(model.parameters(), original.parameters(), strict=True):
        assert got.equal(want)
        assert not got.requires_grad


@pytest.mark.parametrize("estimator", ["sampled", "full"])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(estimator, run, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "estimator": estimator, "max_steps": 4}
    straight = run(True, **settings)
    resumed = run(True, resume=str(tmp_path / "checkpoint-2"), **settings)
    assert resumed.losses == straight.losses[4:]
    for got, want in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert got.equal(want)


def test_a_teacher_loaded_by_name_is_offloaded(make_model, tokenizer, run, tmp_path, monkeypatch):
    """And read into host memory, where TRL's default would put it on a GPU whole."""
    asked = []

    def loading(*settings, **kwargs):
        asked.append(kwargs.get("device_map", "auto"))
        return load_teacher(*settings, **kwargs)

    monkeypatch.setattr("sg_opd.training.frozen.load_teacher", loading)
    folder = tmp_path / "teacher"
    make_model(2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for init_kwargs in (None, {"device_map": "cpu"}):
        trainer = run(True, teacher=str(folder), max_steps=1, teacher_model_init_kwargs=init_kwargs)
        assert [on_meta(layer) for layer in trainer.teacher.unwrapped.model.layers] == [True, True]
    run(False, teacher=str(folder), max_steps=1)
    assert asked == [None, None, "auto"]


def test_blocks_are_the_outermost_modules_of_the_declared_classes(make_model):
    model = make_model(2)
    assert blocks_of(model) == [*model.model.layers]
    model._no_split_modules = {"Qwen3DecoderLayer", "Qwen3Attention", "Qwen3RMSNorm"}
    assert blocks_of(model) == [*model.model.layers, model.model.norm]
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=11, n_positions=16)).eval()
    plain, ids = copy.deepcopy(gpt2), torch.arange(10).unsqueeze(0)
    offload = BlockOffload(gpt2, torch.device("cpu"))
    assert offload.blocks == [*gpt2.transformer.h]
    with torch.no_grad():
        assert gpt2(ids).logits.equal(plain(ids).logits)


def test_what_cannot_be_offloaded_is_refused(make_model, tokenizer, dataset, tmp_path):
    def build(model, **overrides):
        args = make_config(tmp_path, teacher_offload=True, **overrides)
        SGOPDTrainer(make_model(1), model, coin_verifier, args, dataset, processing_class=tokenizer)

    with pytest.raises(ValueError, match=r"`teacher_offload=True`.* but `teacher_server_url` .* leave it at False"):
        make_config(tmp_path, teacher_offload=True, teacher_server_url="http://host:8000", temperature=1.0)
    with pytest.raises(ValueError, match=r"`teacher_offload=True`.* `teacher_model` is a Countdown.* Set teacher_off"):
        build(Countdown())
    folder = tmp_path / "teacher"
    make_model(2, **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for bits in BITS.values():
        with pytest.raises(ValueError, match=r"`teacher_offload=True`.* quantised.* drop `quantization_config`"):
            build(str(folder), teacher_model_init_kwargs={"quantization_config": bits})
    without = make_model(2)
    without._no_split_modules = None
    with pytest.raises(ValueError, match=r"`_no_split_modules`, but a Qwen3ForCausalLM has none. Set teacher_of"):
        build(without)
    dispatched = make_model(2)
    dispatched.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(ValueError, match=r"`teacher_offload=True`.* dispatched .* Load it without `device_map`"):
        build(dispatched)
    twice = make_model(2)
    build(twice)
    with pytest.raises(ValueError, match="remove_hook_from_submodules"):
        build(twice)
    remove_hook_from_submodules(twice)
    build(twice)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_sharded_runs_are_refused_with_what_to_do_instead(kind, make_model, tmp_path):
    from accelerate.utils import DistributedType

    args = SimpleNamespace(distributed_state=SimpleNamespace(distributed_type=DistributedType[kind]))
    with pytest.raises(ValueError, match=rf"`teacher_offload=True` does not run under {kind}.*`offload_param`"):
        check_offload(make_model(2), args)
    args.distributed_state.distributed_type = DistributedType.MULTI_GPU
    check_offload(make_model(2), args)
