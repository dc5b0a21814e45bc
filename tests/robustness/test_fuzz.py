"""A short run of the fuzzer, and what longer ones found."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import jinja2
import pytest

import llmengine
from llmengine.backends.tensorrt.cache import PlanCache
from llmengine.chat.template import MAX_PROMPT_CHARS, MAX_RENDER_S, MAX_STEPS, ChatTemplate
from llmengine.cli.main import main
from llmengine.errors import CorruptFileError, InvalidRequestError, ModelLoadError, RequestFailedError
from llmengine.tokenizer.loading import load_tokenizer
from tests.engine.helpers import make_llm, tokens
from tests.robustness.fuzz import TARGETS, run_inputs
from tests.robustness.fuzz_targets import CONFIGS, make_targets, sealed

MESSAGES = [{"role": "user", "content": "hello"}]


def test_a_short_run_finds_nothing() -> None:
    report = run_inputs(100 * len(TARGETS), seed=0)
    assert not report.findings
    assert set(report.outcomes) == set(TARGETS)
    assert all(counts.total() == 100 for counts in report.outcomes.values())


def test_undamaged_inputs_are_accepted(tmp_path: Path) -> None:
    for target in make_targets(tmp_path):
        for number, seed in enumerate(target.seeds):
            target.read(number, seed)


def segment_of(plans: dict[str, Any]) -> Any:
    return plans["plans"]["mid"]["segment"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda plans: plans.pop("version"), "missing keys: 'version'"),
        (lambda plans: plans.update(compute_capabilities=["8.9"]), "compute_capabilities: expected a list of integers"),
        (lambda plans: plans.update(plans=[]), "plans: expected an object, found list of 0 items"),
        (lambda plans: segment_of(plans).update(profiles=5), "profiles: expected a list of objects, found 5"),
        (lambda plans: segment_of(plans)["inputs"][0].update(shape=[10**30]), "shape: expected a list of sizes in [1"),
        (lambda plans: segment_of(plans)["inputs"][0].update(dtype="[/red]"), "dtype: expected one of float32"),
        (lambda plans: segment_of(plans)["profiles"][0]["tokens"].update(max=2**40), "max: expected an integer in [1"),
        (lambda plans: segment_of(plans)["profiles"][0]["tokens"].update(min=4, opt=1), "expected min <= opt <= max"),
    ],
)
def test_what_a_manifest_says_of_plans_is_checked_before_it_is_shown(
    tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = make_targets(tmp_path, ["sealed_plans"])[0]
    content = json.loads(target.seeds[0])
    damage(content["plans"])
    manifest = tmp_path / "sealed_plans" / "inputs" / "engine.json"
    manifest.write_bytes(sealed(content))
    assert main(["inspect", str(manifest.parent)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"llmengine: {manifest}: plans: ")
    assert message in error
    assert error.count("\n") == 1


def tokenizer_directory(tmp_path: Path, config: dict[str, Any], **changes: Any) -> Path:
    seed = next(target for target in make_targets(tmp_path, ["tokenizer"]) if target.seeds).seeds[1]
    values = json.loads(seed)
    values["model"] |= changes.pop("model", {})
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps({**values, **changes}))
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path / "tokenizer"


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found["step_us"].update({"1": [10**400, 1.0]}),
        lambda found: found["step_us"].update({"1": [1.0]}),
        lambda found: found["checks"][0].update(rms_error="0.5"),
        lambda found: found["checks"][0].update(rms_limit=0),
    ],
)
def test_a_verification_that_none_wrote_counts_as_none(
    tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(make_targets(tmp_path, ["sealed_plans"])[0].seeds[0])
    damage(content["plans"]["verification"])
    manifest = tmp_path / "sealed_plans" / "inputs" / "engine.json"
    manifest.write_bytes(sealed(content))
    assert main(["inspect", str(manifest.parent)]) == 0
    assert "verified    no: the record of it is from another version" in capsys.readouterr().out


def test_an_entry_of_the_cache_that_names_another_plan_is_not_used(tmp_path: Path) -> None:
    """The other plan is whole, so its own hash does not show the mistake."""
    make_targets(tmp_path, ["plan_files"])
    cache = PlanCache(tmp_path / "plan_files" / "inputs-cache")
    entries = sorted((tmp_path / "plan_files" / "inputs-cache").glob("*[0-9a-f].json"))
    plans = [cache.find(entry.stem) for entry in entries]
    assert None not in plans
    values, other = (json.loads(entry.read_text()) for entry in entries[:2])
    entries[0].write_text(json.dumps({**values, "sha256": other["sha256"], "size_bytes": other["size_bytes"]}))
    assert cache.find(entries[0].stem) is None
    entries[0].write_text(entries[1].read_text())
    assert cache.find(entries[0].stem) is None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ([{"name": "default", "template": 5}], "tokenizer_config.json: malformed entry"),
        ([{"name": None, "template": "x"}], "tokenizer_config.json: malformed entry"),
        ([{"name": "../x", "template": "x"}], "tokenizer: the name of a chat template"),
    ],
)
def test_chat_templates_of_wrong_types_name_the_file(tmp_path: Path, template: Any, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_tokenizer(tokenizer_directory(tmp_path, {"chat_template": template}), "huggingface")


def test_a_template_that_does_not_compile_names_the_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_directory(tmp_path, {"chat_template": "{{ $ }}"}), "huggingface")
    with pytest.raises(ModelLoadError, match=re.escape(str(tmp_path))):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"unk_token": "<absent>"}},
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<absent>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {},
            }
        },
    ],
)
def test_a_tokenizer_that_contradicts_itself(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The library raises a bare Exception, or panics with something that is not an Exception."""
    with pytest.raises(CorruptFileError, match=re.escape(str(tmp_path))):
        load_tokenizer(tokenizer_directory(tmp_path, {}, **changes), "huggingface").encode("é hello")


def test_the_tokenizer_of_another_model() -> None:
    with make_llm(vocab_size=100) as llm:
        assert [output.num_prompt_tokens for output in llm.generate("abc", tokens(1))] == [3]
        with pytest.raises(RequestFailedError, match=r"token id 122, outside the model's vocabulary \[0, 100\)"):
            llm.generate("xyz", tokens(1))


TOO_LARGE = str(MAX_PROMPT_CHARS)
LOOP = "{{% set ns = namespace(x='a') %}}{{% for i in range(100) %}}{}{{% endfor %}}{{{{ ns.x }}}}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP.format("{% set ns.x = ns.x ~ ns.x %}"), TOO_LARGE),
        (LOOP.format("{% set ns.x = ns.x + ns.x %}"), TOO_LARGE),
        (LOOP.format("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"), TOO_LARGE),
        (LOOP.format("{% set ns.x = [ns.x, ns.x] %}"), TOO_LARGE),
        (LOOP.format("{% set ns.x = {'a': ns.x, 'b': ns.x} %}"), TOO_LARGE),
        (LOOP.format("{% set ns.x = dict(a=ns.x, b=ns.x) %}"), TOO_LARGE),
        ("{% set a = [1] * 1000000 %}{% for i in a %}{% for j in a %}{% endfor %}{% endfor %}", str(MAX_STEPS)),
        ("{{ '%1000000000d' % 1 }}", "width"),
        ("{{ '{:1000000000}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 1000000000) }}", "width"),
        ("{{ 'x'.center(1000000000) }}", TOO_LARGE),
        ("{{ 'x' | center(1000000000) }}", TOO_LARGE),
        ("{{ ('x\n' * 100000) | indent(100000) }}", TOO_LARGE),
        ("{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}", TOO_LARGE),
        ("{% set a = 'a' * 1000000 %}{{ a | replace('a', a) }}", TOO_LARGE),
        ("{% set a = 'a' * 1000000 %}{{ ([a] * 1000000) | join }}", TOO_LARGE),
        ("{{ messages | map('center', 1000000000) | list }}", TOO_LARGE),
        (LOOP.format("{% set ns.x = 9 ** 60 if i == 0 else ns.x ** 60 %}"), "bits"),
        ("{{ ([[1] * 1000] * 1000) | sum(start=[]) }}", "adds lists with sum"),
        ("{{ lipsum(n=1000000) }}", "undefined"),
    ],
)
def test_what_a_template_makes_is_bounded(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmengine.chat.template.MAX_RENDER_S", 10 * MAX_RENDER_S)  # a busy machine is slow
    with pytest.raises(InvalidRequestError, match=message):
        ChatTemplate(source).render(MESSAGES)


def test_a_template_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmengine.chat.template.MAX_RENDER_S", MAX_RENDER_S / 50)
    begin = time.thread_time()
    with pytest.raises(InvalidRequestError, match=r"takes too long; the limit is 0\.1 s"):
        ChatTemplate("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}").render(MESSAGES)
    assert time.thread_time() - begin < MAX_RENDER_S


def test_a_thread_that_stands_still_in_a_template_does_not_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_still(pattern: str) -> str:
        time.sleep(0.2)
        return pattern

    monkeypatch.setattr("llmengine.chat.template.MAX_RENDER_S", MAX_RENDER_S / 50)
    monkeypatch.setattr("llmengine.chat.sandbox._strftime_now", stand_still)
    template = ChatTemplate("{{ strftime_now('now') }}{% for m in messages %}{{ m.role }}{% endfor %}")
    assert template.render(MESSAGES[:1]) == f"now{MESSAGES[0]['role']}"


def test_counting_keeps_what_loops_know() -> None:
    source = (
        "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k ~ v }}{{ loop.length }}{{ loop.last }} {% endfor %}"
        "{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{{ loop.revindex }}{% endfor %}"
        "{% set a, b = 1, 2 %}{{ (a, b)[1] }}{% for i in nothing %}{% else %}none{% endfor %}"
    )
    assert ChatTemplate(source).render(MESSAGES) == jinja2.Environment().from_string(source).render()


def test_pickles_are_loaded_as_weights_only() -> None:
    """But for messages among processes of one program, which come from no file and from nobody else.

    Those of ranks go through memory that they inherit, or a connection whose ends have proved that they know a secret;
    those of replicas go through Ray, which unpickles what it gets itself.
    """
    package = Path(llmengine.__file__).parent
    backends = package / "backends"
    own_messages = {
        *(*backends.glob("ranks/*.py"), *backends.glob("shared_cuda/*.py"), backends / "cuda" / "following.py"),
        *(backends / "shared_cpu.py", backends / "shared_cpu_passes.py", package / "cluster" / "wire.py"),
    }
    calls = []
    for path in set(package.rglob("*.py")) - own_messages:
        calls += re.findall(r"(?:torch|pickle)\.loads?\([^\n]*", path.read_text())
    assert calls
    assert all("weights_only=True" in call for call in calls), calls


def test_every_family_is_among_the_seeds() -> None:
    from llmengine.models.families import FAMILIES

    assert {config["architectures"][0] for config in CONFIGS} == {family.architecture for family in FAMILIES}
