"""``kvq compare``, ``kvq report``, ``kvq card`` and requirements: from an export to a page, and to an exit code."""

import json
import sys

import pytest

SIZES = ("--seq-len", 256, "--limit", 2)


@pytest.fixture
def scored(run, exported, text, tmp_path):
    """An export and the file of its evaluation."""
    folder, file = exported("int4"), tmp_path / "result.json"
    result = run("eval", folder, "--data", text, *SIZES, "--json", file)
    assert result.exit_code == 0, result.output
    return folder, file


def test_from_an_export_to_a_page_in_one_command(run, exported, text, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("click.launch", opened.append)
    page = tmp_path / "report.html"
    result = run("eval", exported("int4"), "--data", text, *SIZES, "--report", page, "--open")
    assert result.exit_code == 0, result.output
    assert opened == [page.as_uri()]
    assert page.read_text().startswith("<!doctype html>")
    assert "export-int4" in page.read_text()
    assert "kvq eval export-int4 --data text.txt --seq-len 256 --limit 2" in page.read_text()
    assert str(tmp_path) not in page.read_text()


def test_compare_shares_one_baseline(run, tiny_checkpoint, text, tmp_path):
    file, page = tmp_path / "all.json", tmp_path / "all.html"
    model = tiny_checkpoint(head_dim=32)
    result = run(
        "compare",
        model,
        "--recipes",
        "fp16,int8",
        "--recipes",
        "int4",
        "--data",
        text,
        *SIZES,
        "--json",
        file,
        "--report",
        page,
    )
    assert result.exit_code == 0, result.output
    runs = json.loads(file.read_text())["runs"]
    assert [own["recipe"]["name"] for own in runs] == ["fp16", "int8", "int4"]
    assert len({own["results"]["perplexity"]["baseline"] for own in runs}) == 1
    assert runs[0]["results"]["divergence"]["kl"] == 0
    assert runs[1]["results"]["divergence"]["kl"] < runs[2]["results"]["divergence"]["kl"]
    assert "Size against error" in page.read_text()
    for name in ("fp16", "int8", "int4", "perplexity"):
        assert name in result.stdout


def test_report_writes_a_page_or_markdown(run, scored, tmp_path):
    _, file = scored
    page, text = tmp_path / "a.html", tmp_path / "a.md"
    assert run("report", file, "-o", page).exit_code == 0
    assert run("report", file, "-o", text).exit_code == 0
    assert "<svg" in page.read_text()
    assert text.read_text().startswith("## Evaluation")
    assert run("report", file).stdout == text.read_text()


@pytest.mark.long
def test_a_card_gets_its_results_once(run, scored):
    folder, file = scored
    before = (folder / "README.md").read_text()
    shown = run("card", folder, file, "--dry-run")
    assert (folder / "README.md").read_text() == before
    for _ in range(2):
        assert run("card", folder, file).exit_code == 0
    card = (folder / "README.md").read_text()
    assert card == shown.stdout
    assert card.count("## Evaluation") == 1
    # A card with results belongs to the export; one that was changed otherwise does not.
    assert run("check", folder).exit_code == 0
    (folder / "README.md").write_text(card + "and more")
    assert run("check", folder).exit_code == 2
    assert run("generate", folder, "--prompt", "x", "--max-new-tokens", 2).exit_code == 0


def test_a_card_takes_no_results_of_others(run, refuse, scored, exported, tiny_checkpoint, tmp_path):
    folder, file = scored
    data = json.loads(file.read_text())
    other = tmp_path / "other.json"
    for change, says in (
        ({"recipe_hash": "0" * 64}, "another one"),
        ({"hashes": {**data["hashes"], "model": "0" * 64}}, "other weights"),
        ({"partial": True}, "interrupted"),
    ):
        other.write_text(json.dumps({**data, **change}))
        refuse("card", folder, other, says=(says,))
    refuse("card", tiny_checkpoint(name="plain"), file, says=("is no export",))


def test_an_export_takes_results_of_its_model_and_recipe(run, refuse, tiny_checkpoint, text, tmp_path):
    model, file, out = tiny_checkpoint(head_dim=32), tmp_path / "result.json", tmp_path / "out"
    result = run("eval", model, "--recipe", "int4", "--data", text, *SIZES, "--json", file)
    assert result.exit_code == 0, result.output
    # Refused before anything is written.
    refuse("export", model, "--recipe", "int8", "--results", file, "-o", out, says=("another one",))
    other = tiny_checkpoint(head_dim=32, seed=1, name="other")
    refuse("export", other, "--recipe", "int4", "--results", file, "-o", out, says=("other weights",))
    refuse("export", model, "--recipe", "int4", "--results", file, "--target", "plain", "-o", out, says=("'plain'",))
    assert not out.exists()
    assert run("export", model, "--recipe", "int4", "--results", file, "-o", out).exit_code == 0
    card = (out / "README.md").read_text()
    assert card.count("## Evaluation") == 1
    assert run("check", out).exit_code == 0
    # The same section that 'kvq card' writes later.
    assert run("card", out, file).exit_code == 0
    assert (out / "README.md").read_text() == card


def test_requirements_decide_the_exit_code(run, exported, text):
    def judged(*requirements):
        options = [word for own in requirements for word in ("--require", own)]
        return run("eval", folder, "--data", text, "--seq-len", 256, "--limit", 8, *options)

    folder = exported("int4")
    met = judged("kl<5", "top1>0.05", "bits<16", "delta_nll<5")
    assert met.exit_code == 0, met.output
    failed = judged("kl<5", "kl<0.000001", "bits<2")
    assert failed.exit_code == 1
    lines = failed.stderr.strip().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("Not met: kl<0.000001 (kl is 0.")
    assert "±" in lines[0]
    assert "8 windows" in lines[0]
    assert lines[1].startswith("Not met: bits<2")


def test_requirements_are_checked_before_any_work(refuse, exported, text):
    folder = exported("int4")
    refuse("eval", folder, "--data", text, "--require", "kl", says=("not understood",))
    refuse("eval", folder, "--data", text, "--require", "gsm8k.drop<0.01", says=("'gsm8k'", "--tasks"))


def test_bad_requests_are_refused(refuse, exported, scored, text, tmp_path):
    folder, file = scored
    refuse("report", tmp_path / "none.json", "-o", tmp_path / "a.html", says=("none.json",))
    refuse("report", file, "-o", tmp_path / "none/a.html", says=("none",))
    refuse("report", file, "--open", says=("-o FILE",))
    refuse("compare", folder, "--recipes", ",", "--data", text, says=("--recipes is empty",))
    refuse("compare", folder, "--recipes", "int4", "--data", text, says=("brings its own recipe",))
    refuse("eval", folder, "--data", text, "--open", says=("--report",))
    refuse("eval", folder, "--tasks", "needle", "--lengths", "a,b", says=("--lengths",))
    refuse("eval", folder, "--cache", tmp_path / "c", "--no-cache", says=("contradict",))


def test_without_matplotlib_a_page_is_refused_before_any_work(refuse, exported, scored, text, monkeypatch, tmp_path):
    folder, file = scored
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for module in ("kvq.report.drawing", "kvq.report.charts", "kvq.report.html"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    said = ("matplotlib", "pip install 'kvq-toolkit[report]'")
    refuse("report", file, "-o", tmp_path / "a.html", says=said)
    refuse("eval", folder, "--data", text, "--report", tmp_path / "a.html", says=said)
    assert not (tmp_path / "a.html").exists()
