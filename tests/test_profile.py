"""Profiles: what the file may say, what it means for a model, and every mistake's line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitplan import cli, formats, gguf_file, options, profile, profile_rules, units
from bitplan.errors import BitplanError, UnknownNameError, UsageError
from bitplan.profile import Profile
from bitplan.request import Request, for_size
from bitplan.rules import Rules, Share
from bitplan.setting import Setting
from bitplan.units import Unit


def of(tmp_path: Path, text: str) -> Profile:
    (tmp_path / "my.yaml").write_text(text)
    return profile.load(str(tmp_path / "my.yaml"))


@pytest.fixture(scope="module")
def twelve(twelve_layers: Path) -> list[Unit]:
    return units.find(gguf_file.read(twelve_layers))


def resolved(tmp_path: Path, twelve: list[Unit], text: str) -> Rules:
    found = of(tmp_path, text)
    names = profile_rules.candidates(found, gguf=True)
    return profile_rules.rules(found, twelve, options.candidates(names, True))


@pytest.mark.parametrize("name", profile.names())
def test_the_packages_own_fit_any_model(name: str, twelve: list[Unit]) -> None:
    found = profile.load(name)
    assert found.title
    assert found.bpw
    for gguf in (True, False):
        wanted = options.candidates(profile_rules.candidates(found, gguf), True, gguf)
        assert wanted
        profile_rules.rules(found, twelve, wanted)


def test_there_are_the_three_that_the_command_offers() -> None:
    assert profile.names() == ["attention-high", "balanced", "compression-max"]
    assert profile.DEFAULT in profile.names()


def test_rules_become_floors_ceilings_pins_and_shares(tmp_path: Path, twelve: list[Unit]) -> None:
    found = resolved(
        tmp_path,
        twelve,
        """\
rules:
  - {modules: ffn, at_most: 4.6, share_at_most: 0.9}
  - {roles: attn_v, at_least: q5_k}
  - {layers: last 1, modules: attention, format: q6_k}
  - {layers: 0, roles: attn_v, at_least: 3}
  - {outside: embedding, at_least: 2.1}
""",
    )
    assert set(found.pins) == {f"blk.11.attn_{r}" for r in ("q", "k", "v", "output")}
    assert set(found.pins.values()) == {"q6_k"}
    assert found.floors["blk.5.attn_v"] == "q5_k"
    assert found.floors["blk.0.attn_v"] == "iq3_xxs"  # the least candidate of 3 bits or more
    assert "blk.11.attn_v" not in found.floors  # the format came after
    assert found.floors["token_embd"] == "iq2_s"
    assert set(found.ceilings.values()) == {"q4_k"}  # 4.5 bits: the most below 4.6
    (share,) = found.shares
    assert isinstance(share, Share)
    assert (share.least, share.most, len(share.units)) == (None, 0.9, 36)
    assert found.profile == str(tmp_path / "my.yaml")


def test_an_optional_rule_may_name_nothing(tmp_path: Path, twelve: list[Unit]) -> None:
    text = "rules:\n  - {roles: ffn_gate_exps, at_least: 4%s}\n"
    assert not resolved(tmp_path, twelve, text % ", optional: true").floors
    with pytest.raises(UsageError, match=r"my.yaml:2:13: no tensor of this model has the role"):
        resolved(tmp_path, twelve, text % "")


def test_a_base_says_all_and_nothing_is_measured(tmp_path: Path, twelve: list[Unit]) -> None:
    found = of(tmp_path, "base: q4_k\nrules:\n  - {layers: 0-1, modules: ffn, format: q8_0}\n")
    types = profile_rules.explicit(found, twelve, units.everywhere(twelve, "q4_k"))
    assert types["blk.1.ffn_up.weight"] == "q8_0"
    assert types["blk.2.ffn_up.weight"] == types["blk.1.attn_q.weight"] == "q4_k"


def test_json_serves_as_well(tmp_path: Path) -> None:
    (tmp_path / "my.json").write_text(
        json.dumps({"bpw": 3, "rules": [{"layers": 0, "at_least": 4}]})
    )
    assert profile.load(str(tmp_path / "my.json")).bpw == 3


def rule(rest: str) -> str:
    return f"bpw: 4\nrules:\n  - {rest}\n"


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "", "is empty; see `bitplan profiles --schema`"),
        ("- balanced\n", "1:1", "must begin with keys such as 'rules:'"),
        ("rules: [\n", "2:1", "is not YAML here"),
        ("rules:\n\t- layers: 0\n", "2:1", "does not indent with tabs; use spaces"),
        ("bpw: 4\nbpw: 5\n", "2:1", "'bpw' stands here twice; keep one"),
        ("bpw: !!python/name:os.system x\n", "1:6", "is not allowed; write plain values"),
        ("title: mine\n", "1:1", "says nothing; give rules, formats, a base or bpw"),
        ("bwp: 4\n", "1:1", "did you mean 'bpw'?"),
        ("bpw: four\n", "1:6", '\'bpw\' must be a number, not "four"'),
        ("bpw: -4\n", "1:6", "'bpw' must be above 0, not -4"),
        ("bpw: 64\n", "1:6", "'bpw' must be at most 32, not 64"),
        ("formats: q4_k\n", "1:10", "must be a list, with '- ' before each entry"),
        ("formats: []\n", "1:10", "needs at least 1 entry"),
        ("formats: [q4_k, q4_m]\n", "1:17", "did you mean 'q4_"),
        ("formats: [defalt]\n", "1:11", "'default' and 'all' are lists"),
        ("scorer: kll\n", "1:9", "did you mean 'kl'?"),
        ("group: tensors\n", "1:8", "choose from 'tensor', 'module' or 'layer'"),
        ("base: q4_k_x\n", "1:7", "did you mean 'q4_k"),
        ("base: q4_k\nbpw: 4\n", "2:6", "'base' says all; keep one"),
        ("rules: {layers: 0}\n", "1:8", "must be a list"),
        (rule("attention"), "3:5", "must be a mapping of keys to values"),
        (rule("{at_least: 4}"), "3:5", "says no tensors; give layers, roles, modules or outside"),
        (rule("{modules: ffn}"), "3:5", "asks for nothing; give format, at_least, at_most"),
        (rule("{moduls: ffn, at_least: 4}"), "3:6", "did you mean 'modules'?"),
        (rule("{modules: attn, at_least: 4}"), "3:15", "'attention', 'ffn'"),
        (rule("{layers: 8-2, at_least: 4}"), "3:14", "runs backwards; write '2-8'"),
        (rule("{layers: frist 4, at_least: 4}"), "3:14", "names no layers; write a number"),
        (rule("{outside: output, layers: 0, at_least: 4}"), "3:5", "write two rules"),
        (rule("{modules: ffn, at_least: q4_9}"), "3:30", "did you mean 'q4_"),
        (rule("{modules: ffn, at_least: true}"), "3:30", "write q4_k, or 4.5"),
        (rule("{modules: ffn, at_least: 40}"), "3:30", "write from 1 to 32"),
        (rule("{modules: ffn, at_least: q6_k, at_most: q3_k}"), "3:5", "at_least is above at_most"),
        (rule("{modules: ffn, share_at_least: 2, share_at_most: 1}"), "3:5", "swap them"),
        (rule("{modules: ffn, share_at_least: 30%}"), "3:36", "must be a number"),
        (rule("{modules: ffn, format: q8_0, at_least: 4}"), "3:5", "leave out its limits"),
        ("base: q4_k\nrules:\n  - {layers: 0, at_least: 4}\n", "3:5", "give a format instead"),
    ],
)  # fmt: skip
def test_mistakes_name_line_column_and_remedy(
    tmp_path: Path, text: str, place: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        of(tmp_path, text)
    said = str(caught.value)
    assert message in said
    assert said.startswith(f"{tmp_path / 'my.yaml'}:" + (f"{place}: " if place else " "))
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (rule("{layers: 12, at_least: 4}"), "3:14", "the model has layers 0 to 11"),
        (rule("{roles: attn_kv, at_least: 4}"), "3:13", "did you mean 'attn_v'"),
        (rule("{outside: output, at_least: 4}"), "3:15", "write 'embedding'"),
        (rule("{roles: attn_q, modules: ffn, at_least: 4}"), "3:5", "matches nothing"),
        (rule("{modules: ffn, at_least: 9}"), "3:30", "above every candidate (q8_0 has 8.5)"),
        (rule("{modules: ffn, at_most: 2}"), "3:29", "below every candidate (iq2_xxs has"),
        (
            rule("{modules: ffn, at_most: q3_k}\n  - {layers: 0, at_least: q6_k}"),
            "4:5",
            "leaves blk.0.ffn_",
        ),
    ],
)  # fmt: skip
def test_mistakes_that_only_the_model_shows(
    tmp_path: Path, twelve: list[Unit], text: str, place: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolved(tmp_path, twelve, text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'my.yaml'}:{place}: ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'balanced'"):
        profile.load("balancd")
    with pytest.raises(UsageError, match=r"no.yaml: cannot be read .*; check the path"):
        profile.load(str(tmp_path / "no.yaml"))
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not UTF-8 text; convert it first"):
        profile.load(str(tmp_path / "bin.yaml"))


def test_formats_of_the_other_kind_of_file_are_left_out(tmp_path: Path) -> None:
    both = of(tmp_path, "formats: [q4_k, int4-g128]\nprobes: [q4_k]\n")
    assert profile_rules.candidates(both, gguf=True) == "q4_k"
    assert profile_rules.candidates(both, gguf=False) == "int4-g128"
    only = of(tmp_path, "formats: [q4_k]\n")
    with pytest.raises(UsageError, match=r"my.yaml:1:10: names nothing that a folder"):
        profile_rules.candidates(only, gguf=False)


def test_the_schema_knows_every_key() -> None:
    known = profile.schema()
    assert set(known["properties"]) == set(Profile.model_fields)
    assert set(known["$defs"]["Limit"]["properties"]) == set(profile.Limit.model_fields)


def test_the_command_lists_prints_and_explains() -> None:
    runner = CliRunner()
    listed = runner.invoke(cli.app, ["profiles"])
    assert listed.exit_code == 0
    assert all(f"{name} (" in listed.output for name in profile.names())
    assert all(len(line) <= 80 for line in listed.output.splitlines())
    printed = runner.invoke(cli.app, ["profiles", "balanced"])
    assert "rules:" in printed.output
    found = json.loads(runner.invoke(cli.app, ["profiles", "--json"]).output)
    assert found["balanced"]["bpw"] == 4.5
    assert "$defs" in json.loads(runner.invoke(cli.app, ["profiles", "--schema"]).output)
    with pytest.raises(BitplanError, match="unknown profile"):
        runner.invoke(cli.app, ["profiles", "x"], catch_exceptions=False)


def test_a_printed_profile_is_that_profile(tmp_path: Path) -> None:
    printed = CliRunner().invoke(cli.app, ["profiles", "attention-high"]).output
    ours = profile.load("attention-high")
    assert of(tmp_path, printed).model_dump() == ours.model_dump()


def test_small_budgets_reach_down_and_measure_two_formats(tmp_path: Path) -> None:
    asked = Request(tmp_path / "m.gguf", tmp_path)
    low = for_size(asked, 2.5)
    assert {"iq1_s", "iq1_m", "iq2_xs"} < {f.name for f in formats.parse(low.formats)}
    assert low.probes == "q3_k,iq2_xxs"
    for same in (for_size(asked, 3.5), for_size(asked, 0)):
        assert same == asked
    own = replace(asked, formats="q4_k,q2_k")
    assert for_size(own, 2.5) == own
    bare = replace(asked, setting=Setting(no_imatrix=True))
    assert for_size(bare, 2.5) == bare
