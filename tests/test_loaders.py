"""More than a thousand broken files through every loader of the package: one clear error each, or what was saved, within two seconds."""

import torch

from lmlab.core.check import check_loader, stir, tiny_llama
from lmlab.core.check_loader import CLEAR

CASES = dict(model=240, yoco=240, checkpoint=240, results=240, notebook=240, corpus=120)


def passed(report):
    "The table of what was run"
    print(report)
    broken = [r for r in report.runs if r.check.startswith("a_broken_file")]
    assert broken and not report.of("n/a")
    return len(broken)


def test_a_thousand_in_all():
    assert sum(CASES.values()) >= 1000


def load_model(path):
    "As the package loads models: a key that is missing or left over is an error"
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, output_loading_info=True)
    if bad := {k: v for k, v in info.items() if v}:
        raise ValueError(f"the file does not hold this model: {bad}")
    return model


def save_model(model, path):
    stir(model).save_pretrained(path)
    return path


def from_pretrained_survives(model, tmp_path, cases):
    path = save_model(model, tmp_path / "model")
    # transformers reads a config with json and builds it; what it stumbles over there is not ours to word
    clear = (*CLEAR, RecursionError, OverflowError, AttributeError, KeyError, ZeroDivisionError)
    parts = ("config.json", "model.safetensors")
    passed(check_loader(load_model, path, parts=parts, cases=cases, clear=clear, label="from_pretrained"))


def test_stock_models(tmp_path):
    from transformers import LlamaForCausalLM

    from_pretrained_survives(LlamaForCausalLM(tiny_llama()), tmp_path, CASES["model"])


def test_a_chapter_s_model(tmp_path):
    from transformers import AutoModelForCausalLM

    from lmlab.architectures.yoco import contracts

    config = next(o[2]["config"] for o in contracts() if o[0] == "causal_lm")
    from_pretrained_survives(AutoModelForCausalLM.from_config(config), tmp_path, CASES["yoco"])


def test_checkpoints(tmp_path):
    from lmlab.core.fit import load_checkpoint, save_checkpoint

    tensors = dict(model=dict(w=torch.randn(5, 3), b=torch.randn(5)), optimizer=dict(m=torch.randn(5, 3)))
    path = save_checkpoint(tmp_path, 3, tensors, dict(seed=1, history=[dict(step=1, loss=2.5)]))
    names = tuple(sorted(p.name for p in path.iterdir()))
    protected = tuple(
        n for n in names if n != "manifest.json"
    )  # the manifest itself may be written in another way
    passed(
        check_loader(
            load_checkpoint, path, protected=protected, cases=CASES["checkpoint"], label="load_checkpoint"
        )
    )


def test_results(tmp_path):
    from lmlab.core.ledger import read_results, write_json

    claim = dict(id="C1", statement="s", paper="2x", where="Table 1", rule="measured > 1", measured=2.0, spread=0.1, baseline=1.0, unit="", seeds=[0, 1],
                 verdict="holds", why="")  # fmt: skip
    path = tmp_path / "cpu.json"
    write_json(
        path,
        dict(
            slug="yoco",
            scale="cpu",
            code_hash="0" * 16,
            environment=dict(torch="2"),
            claims=[claim, dict(claim, id="C2")],
        ),
    )
    passed(check_loader(read_results, path, cases=CASES["results"], label="read_results"))


def test_notebooks(tmp_path):
    import nbformat

    from lmlab.core.runner import read_notebook

    nb = nbformat.v4.new_notebook()
    nb.cells = [
        nbformat.v4.new_markdown_cell("# Title"),
        nbformat.v4.new_code_cell("x = 1", metadata=dict(tags=["parameters"])),
        nbformat.v4.new_code_cell("x + 1"),
    ]
    path = tmp_path / "x.ipynb"
    nbformat.write(nb, path)
    passed(check_loader(read_notebook, path, cases=CASES["notebook"], label="read_notebook"))


def test_corpora(tmp_path):
    from lmlab.core.corpora import read_rows

    path = tmp_path / "x.json"
    path.write_text('[{"text": "one"}, {"text": "two words"}, {"text": "three"}]')
    # any text that parses as records is a corpus: a block lost inside a word cannot be noticed
    passed(
        check_loader(
            lambda p: list(read_rows(p, "text")),
            path,
            cases=CASES["corpus"],
            structural=False,
            label="read_rows",
        )
    )
