"""lm-eval through kvq: local tasks, faithful log-likelihoods, generation through the packed cache."""

import json
from itertools import pairwise

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvq-toolkit[eval]'")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from kvq.cache import make_plan  # noqa: E402
from kvq.errors import DataError  # noqa: E402
from kvq.eval import lm_head  # noqa: E402
from kvq.eval.evaluate import evaluate  # noqa: E402
from kvq.eval.lm_eval import KvqLM  # noqa: E402
from kvq.integrations import runtime  # noqa: E402
from kvq.models.describe import describe  # noqa: E402
from kvq.recipe import load_recipe  # noqa: E402

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta")
TASKS = {
    "choose": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{label}}"
        metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
    """,
    "continue": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """,
    "roll": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
    """,
}


@pytest.fixture
def task_dir(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = []
    for i in range(9):
        question = " ".join(WORDS[(i * k) % 7] for k in range(1, 4 + 3 * i)) + ":"
        rows.append({"question": question, "choices": [WORDS[i % 7], WORDS[(i + 3) % 7], "q"], "label": i % 3})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, body in TASKS.items():
        lines = [line[8:] for line in body.strip("\n").split("\n")]
        head = [f"task: {name}", "dataset_path: json", f"dataset_kwargs: {{data_files: {{test: {data}}}}}"]
        (folder / f"{name}.yaml").write_text("\n".join([*head, "test_split: test", *lines]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def scores(model, task_dir, limit=None):
    manager = TaskManager(include_path=str(task_dir), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, limit=limit)
    samples = {name: [s["resps"] for s in rows] for name, rows in found["samples"].items()}
    return found["results"], samples


def lm(model, tokenizer, name=None, mode="stream", **settings):
    plan = make_plan(load_recipe(name), describe(model.config)) if name else None
    return KvqLM(model, plan=plan, mode=mode, tokenizer=tokenizer, max_length=256, **settings)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_fp16_equals_lm_evals_own_model_exactly(tiny_model, tiny_tokenizer, task_dir, batch_size):
    model = tiny_model(head_dim=32)
    own = HFLM(pretrained=model, tokenizer=tiny_tokenizer, max_length=256, batch_size=batch_size)
    expected = scores(own, task_dir)
    found = scores(lm(model, tiny_tokenizer, "fp16", batch_size=batch_size), task_dir)
    assert found == expected
    quantized = scores(lm(model, tiny_tokenizer, "int4", batch_size=batch_size), task_dir)
    assert quantized[1]["roll"] != expected[1]["roll"]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("shares", [True, False])
def test_long_documents_score_alike_without_their_whole_logits(
    tiny_model, tiny_tokenizer, monkeypatch, batch_size, shares
):
    """With room for 70 tokens' logits the head never sees more, and scores are lm-eval's own."""
    model = tiny_model(dtype=torch.float64)
    settings = {"tokenizer": tiny_tokenizer, "max_length": 256, "batch_size": batch_size}
    # lm-eval 0.4.13, where two requests of one row are cut at different places and share it, reads the wrong tokens.
    own = HFLM(pretrained=model, logits_cache=False, **settings)
    monkeypatch.setattr(lm_head, "BLOCK_NUMBERS", 70 * model.config.vocab_size)
    asked = [(None, *request) for request in [*REQUESTS, *LONG_REQUESTS]]
    held = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: held.append(output[..., 0].numel()))
    try:
        expected = own._loglikelihood_tokens(asked)
        assert max(held) >= 199
        held.clear()
        found = KvqLM(model, logits_cache=shares, **settings)._loglikelihood_tokens(asked)
    finally:
        hook.remove()
    assert max(held) <= 70
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-12)


REQUESTS = [
    ([5, 9, 30, 7, 8, 12], [20]),
    (list(range(10, 50)), [60, 61, 62]),
    ([3], list(range(70, 100))),
    (list(range(20, 90)), [5, 5]),
    ([44, 45], [46, 47, 48, 49]),
]

# More than 70 tokens: one that is scored nearly whole, two that differ in the last token, one that ends alike but is
# cut elsewhere, and one that loses its beginning.
_LONG = [(7 * i) % 90 for i in range(300)]
LONG_REQUESTS = [
    (_LONG[:3], _LONG[3:200]),
    (_LONG[:120], [*_LONG[120:130], 5]),
    (_LONG[:120], [*_LONG[120:130], 6]),
    (_LONG[:125], [*_LONG[125:130], 7]),
    (_LONG, [1, 2, 3]),
]


def through_cache(model, plan, context, continuation, one_by_one):
    """Log-likelihood of a continuation by really filling the packed cache."""
    tokens = torch.tensor([context + continuation])
    runtime.install(model, plan)
    try:
        cache, logits = runtime.new_cache(model), []
        cuts = [0, *range(1 if one_by_one else len(context), tokens.shape[1])]
        with torch.inference_mode():
            for start, stop in pairwise(cuts):
                logits.append(model(tokens[:, start:stop], past_key_values=cache).logits[0])
    finally:
        runtime.uninstall(model)
    found = torch.cat(logits)[len(context) - 1 :].log_softmax(-1)
    targets = torch.tensor(continuation)
    return float(found.gather(1, targets.unsqueeze(1)).sum()), bool((found.argmax(-1) == targets).all())


@pytest.mark.parametrize("mode", ["stream", "prefill"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_equal_decoding_through_the_cache(tiny_model, tiny_tokenizer, mode, batch_size):
    model = tiny_model(dtype=torch.float64)
    kvq_lm = lm(model, tiny_tokenizer, "int4", mode, batch_size=batch_size)
    found = kvq_lm._loglikelihood_tokens([(None, *request) for request in REQUESTS])
    plain = lm(model, tiny_tokenizer)._loglikelihood_tokens([(None, *request) for request in REQUESTS])
    for request, (value, greedy), (exact, _) in zip(REQUESTS, found, plain):
        expected = through_cache(model, kvq_lm.plan, *request, one_by_one=mode == "stream")
        assert value == pytest.approx(expected[0], abs=1e-8)
        assert greedy == expected[1]
        if mode == "stream" or len(request[1]) > 1:
            assert abs(value - exact) > 1e-4
    reads = [len(c) - (mode == "prefill" or len(x) == 1) for x, c in REQUESTS]
    assert kvq_lm.packed_share == sum(reads) / sum(len(c) for _, c in REQUESTS)


def test_simulate_is_not_touched_by_its_neighbours(tiny_model, tiny_tokenizer):
    model = tiny_model(head_dim=32)
    requests = [(None, *request) for request in REQUESTS]
    together = lm(model, tiny_tokenizer, "kivi2", "simulate", batch_size=5)._loglikelihood_tokens(requests)
    alone = lm(model, tiny_tokenizer, "kivi2", "simulate", batch_size=1)._loglikelihood_tokens(requests)
    stream = lm(model, tiny_tokenizer, "kivi2", "stream")._loglikelihood_tokens(requests)
    for one, other, third in zip(together, alone, stream):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert abs(one[0] - third[0]) > 1e-3


def test_generation_reads_the_packed_cache(tiny_model, tiny_tokenizer, task_dir, monkeypatch):
    model = tiny_model(head_dim=32)
    seen = []
    original = type(model)._prepare_cache_for_generation

    def spy(self, generation_config, model_kwargs, *args, **kwargs):
        seen.append(getattr(self, "kvq", None) and self.kvq.recipe.name)
        return original(self, generation_config, model_kwargs, *args, **kwargs)

    monkeypatch.setattr(type(model), "_prepare_cache_for_generation", spy)
    scores(lm(model, tiny_tokenizer, "int4"), task_dir, limit=2)
    assert seen == ["int4", "int4"]
    plan = make_plan(load_recipe("int8"), describe(model.config))
    runtime.install(model, plan)
    scores(lm(model, tiny_tokenizer), task_dir, limit=1)
    assert seen[2:] == [None]
    assert model.kvq.plan is plan


def test_evaluate_runs_local_tasks_beside_the_baseline(tiny_checkpoint, task_dir):
    folder = tiny_checkpoint(head_dim=32)
    result = evaluate(folder, "int4", tasks=list(TASKS), task_dir=task_dir, limit=4, batch_size=2).to_dict()
    found = result["results"]
    assert found["choose"]["samples"] == found["roll"]["samples"] == 4
    assert found["roll"]["bits_per_byte"]["value"] != found["roll"]["bits_per_byte"]["baseline"]
    assert 0 < found["choose"]["packed_share"] <= 1
    assert 0 < found["continue"]["packed_share"] <= 1
    assert "lm_eval" in result["versions"]
    assert result["windows"] == 0
    json.dumps(result)
    plain = evaluate(folder, tasks=["roll"], task_dir=task_dir, limit=4).to_dict()["results"]["roll"]["bits_per_byte"]
    assert plain["value"] == plain["baseline"] == pytest.approx(found["roll"]["bits_per_byte"]["baseline"], rel=1e-5)


def test_a_task_file_scores_as_the_task_of_its_folder(tiny_checkpoint, task_dir):
    folder = tiny_checkpoint(head_dim=32)
    files = [str(task_dir / "choose.yaml"), str(task_dir / "roll.yaml")]
    found = evaluate(folder, "int4", tasks=files, limit=3).to_dict()["results"]
    assert found == evaluate(folder, "int4", tasks=["choose", "roll"], task_dir=task_dir, limit=3).to_dict()["results"]
    assert found["choose"]["samples"] == 3


@pytest.mark.long
def test_a_group_file_finds_the_tasks_beside_it(tiny_checkpoint, task_dir):
    group = task_dir / "both.yaml"
    group.write_text("group: both\ntask: [choose, roll]\n")
    found = evaluate(tiny_checkpoint(head_dim=32), "int4", tasks=[str(group)], limit=2).to_dict()["results"]
    assert set(found) >= {"choose", "roll"}


def test_unknown_tasks_and_folders_are_named(tiny_checkpoint, task_dir):
    folder = tiny_checkpoint()
    with pytest.raises(DataError, match="Did you mean 'choose'"):
        evaluate(folder, "int4", tasks=["chose"], task_dir=task_dir)
    with pytest.raises(DataError, match="does not exist"):
        evaluate(folder, "int4", tasks=["choose"], task_dir=task_dir / "absent")
    (task_dir / "data.jsonl").unlink()
    with pytest.raises(DataError, match="cannot be set up"):
        evaluate(folder, "int4", tasks=["choose"], task_dir=task_dir)
