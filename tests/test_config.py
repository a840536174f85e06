"""Settings: one order, clear refusals, no effect of loading, and a file that shows every key."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream.config import SECTIONS, load_config
from taesd_stream.errors import ConfigError
from tests.config_document import DEFAULT_TOML, document, section_keys, table_example
from tests.daemon import Daemon, clean_environment, wait_for

KEYS = [(section, key) for section in SECTIONS for key, _ in section_keys(section)]


@pytest.fixture(autouse=True)
def _no_settings_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TAESD_STREAM_")]:
        monkeypatch.delenv(name)


def write(folder: Path, text: str) -> Path:
    """A config file with this text."""
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*, file: Path | None = None, sets: tuple[str, ...] = ()) -> str:
    """What load_config says against it."""
    with pytest.raises(ConfigError) as refused:
        load_config(file, sets)
    return str(refused.value)


def test_default_toml_is_what_the_models_say() -> None:
    """configs/default.toml is the document that the models make, to the letter."""
    assert DEFAULT_TOML.read_text(encoding="utf-8") == document(), "run `python -m tests.config_document`"


def test_default_toml_has_every_key_at_its_default() -> None:
    """configs/default.toml, read by a TOML parser, has each section and key with the value that none would give."""
    values = tomllib.loads(DEFAULT_TOML.read_text(encoding="utf-8"))
    assert values | {"rules": (), "pushes": (), "peers": ()} == load_config().model_dump()


def test_the_rule_that_default_toml_shows_is_one(tmp_path: Path) -> None:
    """The rule in configs/default.toml has every key of a rule; without its `#` it is read as what it says."""
    assert table_example("rules", "#") in DEFAULT_TOML.read_text(encoding="utf-8")
    config = load_config(write(tmp_path, table_example("rules", "")))
    assert [rule.model_dump() for rule in config.rules] == [
        {"stream": "comfy/*", "record": "all", "batch": "each", "film": "off", "decoder": "linear"}
    ]


RULES = """
[[rules]]
stream = "farm/*"
record = "all"
film = "off"
[[rules]]
stream = "farm/test-?"
record = "off"
"""


@pytest.mark.parametrize(
    ("stream", "record", "film"),
    [
        ("farm/a", "all", "off"),
        ("farm/a/b", "all", "off"),
        ("farm/test-1", "off", "off"),
        ("farm/test-1~2", "off", "off"),
        ("farm/test-12", "all", "off"),
        ("Farm/a", None, None),
        ("farm", None, None),
    ],
)
def test_rules_hold_for_names_that_fit(stream: str, record: str | None, film: str | None, tmp_path: Path) -> None:
    """Of the rules whose pattern fits a name, the later one's word holds, key by key."""
    rule = load_config(write(tmp_path, RULES)).rule_of(stream)
    assert (rule.record, rule.film, rule.decoder) == (record, film, None)


def test_rules_reach_the_roles(tmp_path: Path) -> None:
    """A role that takes the resolved configuration as JSON has the same rules."""
    config = load_config(write(tmp_path, RULES))
    assert load_config(values=json.loads(config.to_json())) == config
    assert len(config.rules) == 2


def test_a_wrong_rule(tmp_path: Path) -> None:
    """A rule's misspelt key names the nearest, a wrong value what is allowed, a rule without a name what is missing."""
    text = refusal(file=write(tmp_path, '[[rules]]\nstream = "a"\nrecrod = "all"\n'))
    assert text == "rules.0.recrod: there is no such key; did you mean rules.0.record?"
    text = refusal(file=write(tmp_path, '[[rules]]\nstream = "a"\nrecord = "some"\n'))
    assert text.startswith("rules.0.record: ")
    assert "'all'" in text
    assert refusal(file=write(tmp_path, '[[rules]]\nrecord = "all"\n')).startswith("rules.0.stream: ")


@pytest.mark.parametrize("text", ["a.org,b", "a.org, b ,", '["a.org", "b"]'])
def test_hosts_are_said_alike_everywhere(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By commas or as JSON, by --set and by the environment."""
    assert load_config(sets=[f"web.hosts={text}"]).web.hosts == ["a.org", "b"]
    monkeypatch.setenv("TAESD_STREAM_WEB__HOSTS", text)
    assert load_config().web.hosts == ["a.org", "b"]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WEIGHTS", "/w", "TAESD_STREAM_WEIGHTS: expected JSON, or TAESD_STREAM_WEIGHTS__KEY=value, got '/w'"),
        ("RULES", "x", "TAESD_STREAM_RULES: expected JSON, a list of objects, got 'x'"),
        ("RECORDING__FOLDER", "", "recording.folder: String should have at least 1 character, got ''"),
        ("BROKER__LOG_FOLDER", "", "broker.log_folder: String should have at least 1 character, got ''"),
    ],
)
def test_a_wrong_variable_is_named(variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it holds; an empty one never means the folder where the daemon was started."""
    monkeypatch.setenv(f"TAESD_STREAM_{variable}", value)
    assert refusal() == message


def test_a_rule_beats_the_sampler_and_a_person_beats_the_rule(tmp_path: Path) -> None:
    """A rule keeps a stream whose program said "off"; RECORD off, said before the stream opens, beats both."""
    rules = '[{"stream": "kept/*", "record": "all"}]'
    said: dict[str, str] = {}
    with Daemon(tmp_path, environment={"TAESD_STREAM_RULES": rules}) as daemon:
        daemon.json("/api/v1/streams/kept/two/record", method="POST", body={"mode": "off"})
        for name in ("kept/one", "kept/two", "other"):
            with LatentPublisher(daemon.broker, stream=name, latent_format="sd1", record="off") as publisher:
                publisher.publish(np.zeros((4, 8, 8), np.float16), step=0)
                wait_for(lambda: len(daemon.streams()) == len(said) + 1, of=name)
                said[name] = daemon.streams()[name]["record"]
    assert said == {"kept/one": "all", "kept/two": "off", "other": "off"}


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_every_key_is_explained(section: str, key: str) -> None:
    """Above each key of configs/default.toml stands its field's docstring."""
    _, _, rest = DEFAULT_TOML.read_text(encoding="utf-8").partition(f"\n[{section}]\n")
    body = rest.partition("\n[")[0]
    comment = body.partition(f"\n{key} = ")[0].rpartition("\n\n")[2]
    words = " ".join(line.removeprefix("# ") for line in comment.splitlines() if line.startswith("# "))
    meaning = SECTIONS[section].model_fields[key].description
    assert meaning
    assert words.startswith(meaning)


def test_what_is_loaded_from_default_toml_is_the_default() -> None:
    """A daemon with configs/default.toml is a daemon without any file."""
    assert load_config(DEFAULT_TOML) == load_config()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("broker.bind", "tcp://127.0.0.1:5760"),
        ("broker.workers_bind", "auto"),
        ("broker.log_folder", "auto"),
        ("streamer.packets_bind", "auto"),
        ("web.bind", "127.0.0.1:8765"),
        ("recording.folder", "auto"),
        ("recording.default", "off"),
        ("weights.folder", ""),
    ],
)
def test_keys_that_others_rely_on(path: str, value: str) -> None:
    """Names and defaults that scripts, units and other projects were told."""
    section, _, key = path.partition(".")
    assert load_config().model_dump()[section][key] == value


def test_later_sources_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Defaults < file < environment < --set, key by key: a source that is silent on a key leaves it alone."""
    file = write(tmp_path, "[decoder]\nmax_batch_size = 2\nthreads = 2\nmax_job_s = 2.0\n")
    monkeypatch.setenv("TAESD_STREAM_DECODER__THREADS", "3")
    monkeypatch.setenv("TAESD_STREAM_DECODER__MAX_JOB_S", "3")
    decoder = load_config(file, ["decoder.max_job_s=4"]).decoder
    assert (decoder.choice, decoder.max_batch_size, decoder.threads, decoder.max_job_s) == ("auto", 2, 3, 4.0)


def test_last_set_wins() -> None:
    """A key that is set twice has the later value."""
    assert load_config(sets=["web.bind=127.0.0.1:1", "web.bind=127.0.0.1:2"]).web.bind == "127.0.0.1:2"


@pytest.mark.parametrize("name", ["TAESD_STREAM_WEB__BIND", "taesd_stream_web__bind"])
def test_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key can be set by a variable of the environment."""
    monkeypatch.setenv(name, "127.0.0.1:9000")
    assert load_config().web.bind == "127.0.0.1:9000"


def test_variables_that_are_no_keys_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The publisher's address, and others with our prefix, are no settings of the daemon."""
    monkeypatch.setenv("TAESD_STREAM_ADDRESS", "tcp://127.0.0.1:1")
    monkeypatch.setenv("TAESD_STREAM_SHARED", "/data")
    assert load_config() == load_config(DEFAULT_TOML)


@pytest.mark.parametrize(
    "name", ["TAESD_STREAM_WEB__BNID", "TAESD_STREAM_WBE__BIND", "TAESD_STREAM_WEB_BIND", "TAESD_STREAM_WEB__BIND__X"]
)
def test_a_variable_that_was_meant_as_a_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt variable is refused with the nearest known one; passed over, it would look as if it worked."""
    monkeypatch.setenv(name, "127.0.0.1:9000")
    assert refusal() == f"{name}: there is no such key; did you mean TAESD_STREAM_WEB__BIND?"


def test_a_variable_that_is_no_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section's variable that holds no JSON is refused in words, not by a traceback."""
    monkeypatch.setenv("TAESD_STREAM_WEB", "{oops")
    assert "TAESD_STREAM_WEB: " in refusal()


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt key is an error that says which one was meant, wherever it came from."""
    expected = "recording.foldr: there is no such key; did you mean recording.folder?"
    assert refusal(sets=("recording.foldr=/data",)) == expected
    assert refusal(file=write(tmp_path, "[recording]\nfoldr = '/data'\n")) == expected


def test_an_unknown_section(tmp_path: Path) -> None:
    """A misspelt section names the nearest; one that is like none lists them all."""
    assert refusal(file=write(tmp_path, "[recordings]\n")).endswith("did you mean recording?")
    text = refusal(sets=("zzz.qqq=1",))
    assert all(section in text for section in SECTIONS)


@pytest.mark.parametrize(
    ("word", "limit"),
    [
        ("decoder.max_batch_size=999", "256"),
        ("decoder.max_batch_size=0", "1"),
        ("decoder.max_batch_size=many", "integer"),
        ("broker.idle_interval_s=0", "greater than or equal to 0.01"),
        ("decoder.max_job_s=0", "greater than 0"),
        ("broker.idle_interval_s=nan", "60"),
        ("recording.default=sometimes", "'off', 'last' or 'all'"),
    ],
)
def test_a_wrong_value(word: str, limit: str) -> None:
    """A value that is not allowed is refused with its key, the value, and what is allowed."""
    key, _, value = word.partition("=")
    text = refusal(sets=(word,))
    assert text.startswith(f"{key}: ")
    assert repr(value) in text
    assert limit in text


def test_every_fault_is_named_at_once() -> None:
    """Two faults are two lines: nobody has to start three times."""
    lines = refusal(sets=("web.bnid=x", "decoder.threads=-1")).splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == ["decoder.threads", "web.bnid"]


@pytest.mark.parametrize("word", ["web", "web.bind", "web=1", "=1", ".bind=1", "web.=1"])
def test_a_set_that_is_none(word: str) -> None:
    """`--set` without section, key or value says how it is written."""
    assert f"--set {word}: expected section.key=value" in refusal(sets=(word,))


def test_a_section_that_is_a_value(tmp_path: Path) -> None:
    """A number where a section belongs is refused by the section's name."""
    assert refusal(file=write(tmp_path, "web = 3\n")).startswith("web: expected a section of keys")


@pytest.mark.parametrize("content", [b"[decoder\n", b"\xff\xfe[web]\n"], ids=["no TOML", "no UTF-8"])
def test_a_file_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    """A broken file is refused by its name."""
    file = tmp_path / "config.toml"
    file.write_bytes(content)
    assert refusal(file=file).startswith(f"{file}: ")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """A missing file is refused by its name."""
    assert refusal(file=tmp_path / "none.toml") == f"{tmp_path / 'none.toml'}: No such file or directory"


def test_what_was_resolved_is_not_resolved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A role takes its supervisor's configuration as it is: the environment had its say there, below --set."""
    monkeypatch.setenv("TAESD_STREAM_WEB__BIND", "127.0.0.1:1")
    resolved = load_config(sets=["web.bind=127.0.0.1:2"])
    assert load_config(values=json.loads(resolved.to_json())) == resolved


@pytest.mark.slow
def test_set_beats_the_environment_in_a_running_daemon(tmp_path: Path) -> None:
    """What --set says holds in every role, whatever the environment that they inherit says."""
    elsewhere = tmp_path / "elsewhere"
    with Daemon(tmp_path, environment={"TAESD_STREAM_RECORDING__FOLDER": str(elsewhere)}) as daemon:
        assert (daemon.recordings_folder / ".latents").is_dir()
    assert not elsewhere.exists()


@pytest.mark.slow
def test_a_stream_that_nobody_watches_is_asked_as_often_as_the_key_says(tmp_path: Path) -> None:
    """`broker.idle_interval_s` reaches the sampler: under its default of 2 s, many frames come in a short while."""
    seen: set[int] = set()

    def has_seen_enough() -> bool:
        publisher.publish(np.zeros((4, 8, 8), np.float16), step=0)
        row = daemon.streams().get("unwatched", {})
        seen.update(seq for seq in [row.get("seq")] if seq is not None)
        return len(seen) > 20

    with (
        Daemon(tmp_path, "broker.idle_interval_s=0.05") as daemon,
        LatentPublisher(daemon.broker, stream="unwatched", latent_format="sd1") as publisher,
    ):
        wait_for(has_seen_enough, 30.0, of="20 different frames")


LOAD_AND_TELL = """
import json, logging, os, sys
before = (dict(os.environ), list(sys.argv), os.getcwd(), sorted(os.listdir()))
from taesd_stream.config import load_config
config = load_config(sets=["recording.folder=recordings", "weights.folder=none", "decoder.device=cuda:7"])
config.recording_folder, config.log_folder, config.weights_folder
after = (dict(os.environ), list(sys.argv), os.getcwd(), sorted(os.listdir()))
modules = sorted({"torch", "av", "fastapi", "uvicorn"} & set(sys.modules))
print(json.dumps([before == after, logging.getLogger().handlers, modules]))
"""


def test_loading_has_no_effect(tmp_path: Path) -> None:
    """Loading makes no folder, sets up no logging, looks at no device, and imports none of what is heavy."""
    environment = clean_environment(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_TELL], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == [True, [], []]


def test_a_loaded_configuration_does_not_change() -> None:
    """Sections are frozen: what was resolved at the start holds."""
    config = load_config()
    with pytest.raises(ValueError, match="frozen"):
        config.web.bind = "127.0.0.1:1"
    assert config.with_values(web={"bind": "127.0.0.1:1"}).web.bind == "127.0.0.1:1"
    assert config.web.bind == "127.0.0.1:8765"
    assert logging.getLogger("taesd_stream").handlers == []


@pytest.mark.parametrize(
    ("memory_bytes", "free_gib", "expected_gib"), [(0, 0, 1), (0, 4, 1), (0, 16, 2), (0, 80, 4), (3 << 30, 80, 3)]
)
def test_the_decoders_budget(memory_bytes: int, free_gib: int, expected_gib: int) -> None:
    """Left alone it is an eighth of what a GPU has free, 1 to 4 GiB; what a person says is taken as it is."""
    decoder = load_config(sets=[f"decoder.memory_bytes={memory_bytes}"]).decoder
    assert decoder.budget_bytes(free_gib << 30) == expected_gib << 30


def test_a_budget_too_small_for_any_picture_is_refused() -> None:
    """Between 0 and 64 MiB there is no budget."""
    assert "decoder.memory_bytes" in refusal(sets=("decoder.memory_bytes=1",))
