"""What kvq relies on of lm-eval (``kvq/eval/lm_eval.py``, ``kvq/eval/harness.py``)."""

import inspect

import pytest

lm_eval = pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

from lm_eval.api.registry import get_model, register_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402


def test_a_model_can_be_registered_and_found():
    @register_model("kvq_contract")
    class Model(HFLM):
        pass

    assert get_model("kvq_contract") is Model


def test_the_scoring_method_that_kvq_overrides():
    """Requests are ((context, continuation), context tokens, continuation tokens)."""
    parameters = list(inspect.signature(HFLM._loglikelihood_tokens).parameters)
    assert parameters == ["self", "requests", "disable_tqdm", "override_bs"]


def test_a_loaded_model_is_taken_as_it_is(tiny_model, tiny_tokenizer):
    model = tiny_model()
    wrapped = HFLM(pretrained=model, tokenizer=tiny_tokenizer, backend="causal", batch_size=2)
    assert wrapped.model is model
    assert wrapped.batch_size == 2
    assert wrapped.max_length == model.config.max_position_embeddings
    assert wrapped.vocab_size == len(tiny_tokenizer)
    for name in ("cache_hook", "softmax_dtype", "generate_until"):
        assert hasattr(wrapped, name)


def test_an_evaluation_takes_these_settings():
    wanted = {
        "model", "tasks", "task_manager", "limit", "bootstrap_iters", "log_samples", "random_seed",
        "numpy_random_seed", "torch_random_seed", "fewshot_random_seed",
    }  # fmt: skip
    assert wanted <= set(inspect.signature(lm_eval.simple_evaluate).parameters)


def test_tasks_can_be_limited_to_a_folder(tmp_path):
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert list(manager.all_tasks) == []
