"""What is left of an error on the terminal: a sentence where the mistake is the user's; the stack is in the log."""

import logging
import pickle
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from tiny import OVERRIDES, TWO, train
from torch._utils import ExceptionWrapper

from diffaug import LinearBeta
from diffaug.__main__ import main
from diffaug.checks import number
from diffaug.commands.plot import read_levels
from diffaug.datasets.folder import ImageFolder
from diffaug.training.errors import UserError, for_the_user, sentence
from diffaug.training.sweeps import Guard


def caught(function, *arguments, **options) -> Exception:
    with pytest.raises(Exception) as error:  # noqa: PT011 - its text is what is tested
        function(*arguments, **options)
    return error.value


@pytest.fixture
def broken(tmp_path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in "abcd":
        Image.new("L", (8, 8), 200).save(folder / f"{name}.png")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:50])
    return folder


def test_what_diffaug_refuses_is_a_sentence():
    text = "schedule.beta_end must be a number in (0, 1), but got 'abc' (str)."
    assert sentence(caught(LinearBeta, beta_end="abc")) == text
    config = OmegaConf.create({"a": {"_target_": "diffaug.LinearBeta", "beta_end": "abc"}})
    error = caught(instantiate, config)
    assert isinstance(error, InstantiationException)
    assert sentence(error) == text


def test_what_is_refused_in_resolving_a_key_is_a_sentence(tmp_path):
    """The shape of a store's images is asked for as the configuration is read."""
    (tmp_path / "store.json").write_text('{"format": 9}')
    wanted = {f"{tmp_path}/none": "data.root='.*none' holds no store: .*", str(tmp_path): ".* is of format 9, .*"}
    for root, text in {**wanted, "???": r"data\.root is not set and has no default: give it the folder .*"}.items():
        config = OmegaConf.create({"data": {"root": root, "shape": "${diffaug.shape_of:${oc.select:data.root}}"}})
        for read in (lambda config=config: config.data.shape, partial(instantiate, config)):
            assert re.fullmatch(text, sentence(caught(read)))
    OmegaConf.register_new_resolver("bug", lambda: int("x"), replace=True)
    said = sentence(caught(lambda: OmegaConf.create({"a": "${bug:}"}).a))
    assert said.startswith("ValueError raised while resolving interpolation: invalid literal")


def test_an_unset_key_is_named():
    config = OmegaConf.create({"data": {"root": "???"}})
    said = sentence(caught(lambda: config.data.root))
    assert said == "data.root is not set and has no default: give it a value by data.root=..."


def test_what_others_raise_keeps_its_stack(tmp_path):
    def own():
        raise ValueError("in the user's own code")

    assert sentence(caught(own)) is None
    bad = tmp_path / "bad.csv"
    columns = "stage,step,epoch,low,high,count,mean,std,weighted,over"
    bad.write_text(f"{columns}\ntrain,x,0,0,1,1,1,1,1,unit\n")
    error = caught(read_levels, str(bad))
    assert "invalid literal" in str(error), "int() fails, in a line of diffaug's"
    assert sentence(error) is None


def test_configurations_that_others_refuse():
    config = OmegaConf.create({"schedule": {"_target_": "diffaug.LinearBeta", "foo": 1}})
    error = caught(instantiate, config.schedule)
    assert re.fullmatch(
        r"schedule cannot be made by diffaug\S*\.LinearBeta: .* got an unexpected keyword argument 'foo' \(TypeError\)",
        sentence(error),
    )
    error = caught(instantiate, {"_target_": "pytorch_lightning.Trainer", "precision": "nonsense"})
    assert "Precision 'nonsense' is invalid" in sentence(error)
    error = caught(instantiate, {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "profiler": "none"})
    assert re.fullmatch(r"Lightning's Trainer refuses its arguments \(trainer\.\*\): .*profiler.*", sentence(error))


def test_from_a_worker(broken):
    """As torch hands an error on from a DataLoader's worker: as text, with its stack in it."""

    def read(function, *arguments):
        try:
            function(*arguments)
        except Exception:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 1")
        return caught(wrapped.reraise)

    error = read(ImageFolder(str(broken), 8).__getitem__, 2)
    assert "Original Traceback" in str(error)
    path = re.escape(f"{broken}/c.png")
    known = rf"Sample 2, {path}, cannot be read: [^\n]*diffaug check data=image_folder [^\n]*"
    assert re.fullmatch(known, sentence(error))
    refused = read(partial(number, "data.val_at", 3, at_least=0, at_most=1))
    assert sentence(refused) == "data.val_at must be a number in [0, 1], but got 3 (int)."
    assert sentence(read(int, "x")) is None


def test_the_stack_goes_to_the_log(tmp_path, monkeypatch):
    log = tmp_path / "train.log"
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.FileHandler(log)])
    error = caught(LinearBeta, beta_end="abc")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    told = for_the_user(error)
    assert isinstance(told, UserError)
    assert str(told) == f"{error}\nThe stack is in {log}"
    assert str(pickle.loads(pickle.dumps(told))) == str(told), "submitit sends it from one process to another"
    assert re.search(
        r"(?s)Traceback.*in __post_init__.*ValueError: schedule\.beta_end", (tmp_path / "train.log").read_text()
    )
    bug = caught(int, "x")
    assert for_the_user(bug) is bug
    assert "invalid literal" in log.read_text()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert for_the_user(error) is error
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    assert for_the_user(error) is error, "the stack would be nowhere"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preview", "data=image_folder"], r"preview: data\.root is not set and has no default"),
        (["preview", "data=image_folder", "data.root=BROKEN"], r"Sample \d, \S+/c\.png, cannot be read: .*Remove or"),
        (["preview", "data=cifar10", "data.root=BROKEN"], r"(?s)CIFAR10 cannot be read.*data\.download=true to fetch"),
        (
            ["report", "schedule.beta_end=abc"],
            r"report: schedule\.beta_end must be a number in \(0, 1\), but got 'abc'",
        ),
        (["report", "schedule.beta=1"], r"report: Could not override 'schedule\.beta'"),
    ],
)
def test_commands_say_what_was_wrong(arguments, message, broken, capsys, monkeypatch):
    monkeypatch.setattr("diffaug.process.compiler.compiler_for", lambda _: False)  # it takes seconds
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert main([word.replace("BROKEN", str(broken)) for word in arguments]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "Traceback" not in said
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert isinstance(caught(main, [word.replace("BROKEN", str(broken)) for word in arguments]), Exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "strip", "cosine", "sizes=a"], r"sizes must be whole numbers >= 1, such as sizes=16,64, but got 'a'"),
        (["plot", "strip", "cosine", "sizes=16,0"], r"sizes must be whole numbers >= 1, .* but got '16,0'"),
        (["check", "workers=-1"], r"check: workers must be a whole number >= 0, but got '-1'"),
    ],
)
def test_a_command_s_own_numbers_are_looked_at_first(arguments, message, capsys):
    assert main(arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_alone_it_prints_its_help(capsys):
    for words in ([], ["plot", "--help"]):
        assert main(words) == 0
        assert "export ckpt=RUN out=FOLDER" in capsys.readouterr().out


def test_what_is_no_command_is_said(capsys):
    assert main(["plot", "scheduels", "linear"]) == 2
    assert "there is no 'plot scheduels', only report, plot schedules, plot recipes," in capsys.readouterr().err


def test_a_plot_of_parts_wants_parts(capsys):
    assert main(["plot", "parts", "independent"]) == 1
    assert "plot parts needs parts=frames or patches (or experiment=diffusion_forcing)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        ("preview", "pictures", r"out must be a file that ends in \.png, \.svg, \.pdf, but got 'pictures'"),
        ("plot schedules", "/dev/null/a.png", r"out=/dev/null/a\.png cannot be written: Not a directory: /dev/null\.$"),
        ("encode", "/dev/null", r"out=/dev/null cannot be written: Not a directory: /dev/null\.$"),
        ("export", "/dev/null/a/b", r"out=/dev/null/a/b cannot be written: Not a directory: /dev/null\.$"),
    ],
)
def test_where_nothing_can_be_written_is_said_before_the_work(command, out, message, capsys):
    assert main([*command.split(), "data=no_such_data", f"out={out}"]) == 1
    assert re.search(message, capsys.readouterr().err.strip())


def test_a_run_s_folder_that_cannot_be_made_is_said(capsys):
    with pytest.raises(SystemExit):
        Guard().on_run_start(OmegaConf.create({"hydra": {"run": {"dir": "/dev/null/run"}}}))
    assert capsys.readouterr().err == "hydra.run.dir=/dev/null/run cannot be written: Not a directory.\n"


def failed(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return train(folder, *OVERRIDES, "hydra.run.dir=run", *words, expect=1, **variables)


@pytest.mark.slow
def test_a_run_that_fails_says_a_sentence_and_where_the_stack_is(tmp_path):
    words = ["data=image_folder", "data.root=nowhere"]
    done = failed(tmp_path, *words)
    said = done.stderr[done.stderr.index("Error executing job") :].splitlines()
    log = tmp_path / "run" / "train.log"
    assert re.match(r"data\.root='nowhere' is not a folder \(looked for ", said[1])
    assert said[2] == f"The stack is in {log}"
    assert len(said) == 5
    assert re.search(r"(?s)Traceback.*FileNotFoundError: data\.root='nowhere'", log.read_text())
    full = failed(tmp_path, *words, HYDRA_FULL_ERROR="1").stderr
    assert re.search(r"(?s)Traceback.*trainer\.fit\(.*FileNotFoundError: data\.root='nowhere'", full)
    assert "The stack is in" not in full
    assert "Traceback" in failed(tmp_path, "+model.network.mark=rank0").stderr, "the user's own code"


@pytest.mark.slow
def test_a_file_that_breaks_in_a_worker(tmp_path, broken):
    words = ["data=image_folder", f"data.root={broken}", "data.channels=1", "data.image_size=8", "data.num_workers=1"]
    done = failed(tmp_path, *words, "data.val_share=0.2")
    assert re.search(r"\nSample \d, \S+c\.png, cannot be read: .*\n(in reading .*\n)?The stack is in ", done.stderr)
    assert "Traceback" not in done.stderr
    assert "DataLoader worker process" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
def test_of_two_ranks_each_says_its_own(tmp_path):
    done = failed(
        tmp_path, *TWO, "data.image_shape=[1,4,4]", "model.network.in_channels=1", "model.network.out_channels=1"
    )
    assert re.search(r"\ndata\.image_shape says \[1, 4, 4\], but data\.train\[0\] has shape \[1, 8, 8\]", done.stderr)
    assert "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
def test_a_sweep_repeats_the_sentence_in_its_table(tmp_path):
    words = ("-m", *OVERRIDES, "hydra.sweep.dir=sweep", "schedule.beta_end=abc,0.02")
    done = train(tmp_path, *words, expect=1)
    assert "Traceback" not in done.stderr
    assert re.search(
        r"\n +0  schedule\.beta_end=abc +failed: schedule\.beta_end must be .*, but got 'abc' \(str\)\.\n",
        done.stdout,
    )
    assert "Traceback" in (tmp_path / "sweep" / "0" / "train.log").read_text()
