"""Specs as TOML: what wins, what every fault says, whole, and that what is written loads back."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

from ldctl import toml
from ldctl.errors import SpecError
from ldctl.schema import Spec
from ldctl.toml_text import literal, locate, syntax_fault, write


class Soft(Spec):
    kind: Literal["soft"] = "soft"
    region: str = "main"
    weight: float = Field(default=1.0, gt=0)
    soft: int = 0  # a key with the name of its own kind


class Hard(Spec):
    kind: Literal["hard"] = "hard"
    margin: int
    tags: tuple[str, ...] = ()


Term = Annotated[Soft | Hard, Field(discriminator="kind")]


class Net(Spec):
    depth: Literal[18, 50] = 50
    width: float = 1.0
    norm: Literal["frozen", "trainable"] | None = None


class Ema(Spec):
    decay: float
    ramp: int | Literal["auto"] = "auto"

    @field_validator("decay")
    @classmethod
    def _check(cls, decay: float) -> float:
        if not 0 < decay < 1:
            raise ValueError("has to lie between 0 and 1;\nwrite 0.999")
        return decay


class Job(Spec):
    name: str
    epochs: int = Field(default=12, ge=1)
    lr: float = 0.01
    verbose: bool = False
    output: Path | None = None
    sizes: tuple[int, int] = (1, 2)
    grid: tuple[tuple[float, ...], ...] = ()
    net: Net = Net()
    ema: Ema | None = None
    terms: tuple[Term, ...] = (Soft(), Soft(region="far", weight=0.5), Hard(margin=3))
    best: Term | None = None
    labels: dict[str, int] = Field(default_factory=dict)
    nets: dict[str, Net] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "both" and self.epochs == 13:
            raise ValueError("both and 13 do not go together")
        return self


def load(text: str | None, tmp_path: Path, flags: dict[str, object] | None = None, *assignments: str) -> Job:
    if text is None:
        return toml.load(Job, file=None, flags=flags or {}, assignments=assignments)
    (tmp_path / "x.toml").write_bytes(text.encode())
    return toml.load(Job, file=tmp_path / "x.toml", flags=flags or {}, assignments=assignments)


def faults(text: str | None, tmp_path: Path, flags: dict[str, object] | None = None, *assignments: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(text, tmp_path, flags, *assignments)
    return str(caught.value).replace(f"{tmp_path}/", "").split("\n")


# --- layers ---


def test_later_layers_win(tmp_path: Path) -> None:
    text = 'name = "a"\nepochs = 1\nlr = 1\n[net]\nwidth = 0.5\n'
    job = load(text, tmp_path, {"epochs": 2, "net.depth": 18, "output": Path("runs/x")}, "epochs=3", "net.norm=frozen")
    assert job == Job(name="a", epochs=3, lr=1.0, output=Path("runs/x"), net=Net(depth=18, width=0.5, norm="frozen"))


def test_nothing_given_is_the_schema(tmp_path: Path) -> None:
    assert load(None, tmp_path, {"name": "a"}) == Job(name="a")


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("lr=1e-3", "lr", 1e-3),
        ("lr = 2", "lr", 2.0),
        ("name=data/coco", "name", "data/coco"),
        ("name=a = b", "name", "a = b"),
        ("name=", "name", ""),
        ('name="0.5"', "name", "0.5"),
        ("name=2026-11-22", "name", "2026-11-22"),
        ("name=True", "name", "True"),
        ("verbose=true", "verbose", True),
        ("sizes=[3, 4]", "sizes", (3, 4)),
        ("ema={decay = 0.5}", "ema", Ema(decay=0.5)),
        ("ema.decay=0.5", "ema", Ema(decay=0.5)),
        ('labels."a.b"=1', "labels", {"a.b": 1}),
        ("labels.0=1", "labels", {"0": 1}),
        ("nets.small.depth=18", "nets", {"small": Net(depth=18)}),
    ],
)
def test_assignments_are_toml_or_bare_words(tmp_path: Path, assignment: str, path: str, value: object) -> None:
    assert getattr(load('name = "n"', tmp_path, None, assignment), path) == value


def test_items_of_lists_are_addressed_by_index(tmp_path: Path) -> None:
    text = 'name = "a"\n[[terms]]\nkind = "soft"\n[[terms]]\nkind = "hard"\nmargin = 1\n'
    job = load(text, tmp_path, None, "terms.0.weight=0.25", "terms.1.margin=7", "sizes=[5, 6]", "sizes.1=9")
    assert job.terms == (Soft(weight=0.25), Hard(margin=7))
    assert job.sizes == (5, 9)


def test_items_of_a_default_list_are_addressed_by_index(tmp_path: Path) -> None:
    job = load('name = "a"', tmp_path, None, "terms.1.weight=0.25")
    assert job.terms == (Soft(), Soft(region="far", weight=0.25), Hard(margin=3))


# --- faults, whole ---


def test_every_fault_is_listed_at_once(tmp_path: Path) -> None:
    text = """\
# comment = 1
epocs = 3
lr = "0.01"

[net]
depth = 34
widht = 1.0

[[terms]]
kind = "soft"
weigth = 1.0

[[terms]]
kind = "hard"
"""
    flags = {"epochs": 0, "verbose": "yes"}
    assert faults(text, tmp_path, flags, "sizes=[1, 2.5]", "sizes.7=1", "nonsense", "net.norm=thawed") == [
        "x.toml: name: missing; add name = ... at the top",
        "x.toml:2: epocs: unknown key; did you mean 'epochs'?",
        'x.toml:3: lr: expected a number, given "0.01"',
        "x.toml:6: net.depth: expected 18 or 50, given 34",
        "x.toml:7: net.widht: unknown key; did you mean 'width'?",
        "x.toml:11: terms.0.weigth: unknown key; did you mean 'weight'?",
        "x.toml:13: terms.1.margin: missing; add margin = ... to [[terms]]",
        "command line: epochs: must be greater than or equal to 1, given 0",
        'command line: verbose: expected true or false, given "yes"',
        "--set sizes=[1, 2.5]: sizes.1: expected a whole number, given 2.5",
        "--set sizes.7=1: sizes.7: sizes is a list of 2; its items are 0 to 1",
        "--set nonsense: no '='; write section.key=value",
        "--set net.norm=thawed: net.norm: expected 'frozen' or 'trainable', given \"thawed\"",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name = 1", ["x.toml:1: name: expected text in quotes, given 1"]),
        ('name = "a"\nepochs = 1.5', ["x.toml:2: epochs: expected a whole number, given 1.5"]),
        ('name = "a"\nepochs = true', ["x.toml:2: epochs: expected a whole number, given true"]),
        ('name = "a"\nnet = 3', ["x.toml:2: net: expected a table, given 3"]),
        ('name = "a"\nsizes = 3', ["x.toml:2: sizes: expected a list, given 3"]),
        ('name = "a"\noutput = 3', ["x.toml:2: output: expected text in quotes, given 3"]),
        (
            'name = "a"\nsizes = [\n  1,\n  "b", # two\n]',
            ['x.toml:4: sizes.1: expected a whole number, given "b"'],
        ),
        ('name = "a"\nsizes = [1]', ["x.toml:2: sizes.1: missing; the list is too short"]),
        ('name = "a"\n[nets]\nx = 1', ["x.toml:3: nets.x: expected a table, given 1"]),
        ('name = "a"\nema = {}', ["x.toml:2: ema.decay: missing; add decay = ... to [ema]"]),
        (
            'name = "a"\nema.decay = 2.0',
            ["x.toml:2: ema.decay: has to lie between 0 and 1; write 0.999"],
        ),
        (
            'name = "a"\n[ema]\ndecay = 0.5\nramp = "x"',
            ["x.toml:4: ema.ramp: expected a whole number or 'auto', given \"x\""],
        ),
        ('name = "both"\nepochs = 13', ["x.toml: both and 13 do not go together"]),
        ('name = "a"\n[[terms]]\nkind = "sofd"', [
            "x.toml:3: terms.0.kind: expected 'soft' or 'hard', given \"sofd\"; did you mean 'soft'?"
        ]),
        ('name = "a"\n[[terms]]\nweight = 1.0', ["x.toml:2: terms.0.kind: missing; one of 'soft' or 'hard'"]),
        ('name = "a"\n[[terms]]\nkind = "soft"\nweight = "x"\nsoft = "y"', [
            'x.toml:4: terms.0.weight: expected a number, given "x"',
            'x.toml:5: terms.0.soft: expected a whole number, given "y"',
        ]),
        ('name = "a"\n[best]\nkind = "soft"\nweight = -1.0', [
            "x.toml:4: best.weight: must be greater than 0, given -1.0",
        ]),
        ('name = "a"\n[best]\nkind = "hard"\nmarjin = 1', [
            "x.toml:2: best.margin: missing; add margin = ... to [best]",
            "x.toml:4: best.marjin: unknown key; did you mean 'margin'?",
        ]),
        ('name = "a"\nterms = [3]', ["x.toml:2: terms.0: expected a table, given 3"]),
        ('name = "a"\n[nets.tiny]\ndeep = 1\n', ["x.toml:3: nets.tiny.deep: unknown key; did you mean 'depth'?"]),
        ('name = "a"\n[net]\nzzz = 1', ["x.toml:3: net.zzz: unknown key; known here: depth, width, norm"]),
        ('name = "a"\nnets.a.depth = 19', ["x.toml:2: nets.a.depth: expected 18 or 50, given 19"]),
    ],
)  # fmt: skip
def test_fault_says_where_and_what(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert faults(text, tmp_path) == expected


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("lr=fast", '--set lr=fast: lr: expected a number, given "fast"'),
        ("lr=inf", "--set lr=inf: lr: expected a finite number, given inf"),
        ("lr=-inf", "--set lr=-inf: lr: expected a finite number, given -inf"),
        ("lr=1e999", "--set lr=1e999: lr: expected a finite number, given inf"),
        ("lr=nan", "--set lr=nan: lr: expected a finite number, given nan"),
        ("net.width=nan", "--set net.width=nan: net.width: expected a finite number, given nan"),
        ("epochs=inf", "--set epochs=inf: epochs: expected a whole number, given inf"),
        ("lr.x=1", "--set lr.x=1: lr.x: lr is 0.5, which has no keys of its own"),
        ("name=[1", "--set name=[1: name: [1 is not a TOML value; check quotes and brackets"),
        ("=1", "--set =1: : not a key; write section.key=value"),
        ("net.=1", "--set net.=1: net.: not a key; write section.key=value"),
        ("a b=1", "--set a b=1: a b: not a key; write section.key=value"),
        ('"\\q"=1', '--set "\\q"=1: "\\q": not a key; write section.key=value'),
        ("terms.3.weight=1", "--set terms.3.weight=1: terms.3.weight: terms is a list of 3; its items are 0 to 2"),
        ("terms.x.weight=1", "--set terms.x.weight=1: terms: expected a list, given {x = {weight = 1}}"),
        ("terms.0.wait=1", "--set terms.0.wait=1: terms.0.wait: unknown key; did you mean 'weight'?"),
        ("terms.0.kind=hard", "--set terms.0.kind=hard: terms.0.margin: missing; add margin = ... to [[terms]]"),
        ("ema.ramp=3", "--set ema.ramp=3: ema.decay: missing; add decay = ... to [ema]"),
        ("name=1\nlr = 2", "--set name=1 lr = 2: name: more than one value; use one --set for each"),
    ],
)
def test_assignment_fault_says_which(tmp_path: Path, assignment: str, expected: str) -> None:
    assert expected in faults('name = "a"\nlr = 0.5', tmp_path, None, assignment)


def test_an_override_takes_the_blame_from_the_file(tmp_path: Path) -> None:
    text = 'name = "a"\n[net]\ndepth = 34\n'
    assert faults(text, tmp_path, {"net.depth": 35}) == ["command line: net.depth: expected 18 or 50, given 35"]
    assert faults(text, tmp_path, None, "net={depth = 36}") == [
        "--set net={depth = 36}: net.depth: expected 18 or 50, given 36"
    ]


def test_missing_without_a_file(tmp_path: Path) -> None:
    assert faults(None, tmp_path) == ["name: missing; add name = ... at the top"]


# --- files that cannot be read ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nname = data/coco\n", "x.toml:2:8: not a TOML value; text goes in quotes"),
        ("a = 1 2\n", "x.toml:1:7: a value ends before this; text goes in quotes"),
        ("a = 1\n= 3\n", "x.toml:2:1: not a [section] and not a key = value line"),
        ("a = [1,\n2", "x.toml:2:2: Unclosed array"),
        ("a = 1\n\nb = 2\na = 3\n", "x.toml:4: a: given twice, first in line 1; keep one of them"),
        ("a = [1]\nb = 2\na = [\n 3, 4]\n", "x.toml:3: a: given twice, first in line 1; keep one of them"),
        ("[net]\na = 1\n[ema]\n[net]\n", "x.toml:4: net: given twice, first in line 1; keep one of them"),
        ("[net]\na = 1\n[net.a]\n", "x.toml:3: net.a: given twice, first in line 2; keep one of them"),
        ("[net]\na = {b = 1,\n", "x.toml:2:"),
        ("x = {b = 1, b = 2}\n", "x.toml:1: x.b: given twice, first in line 1; keep one of them"),
        ("x = 1\n[[x]]\n", "x.toml:2:4: this key or section is given twice; keep one of them"),
    ],
)
def test_syntax_faults_say_line_and_column(tmp_path: Path, text: str, expected: str) -> None:
    (fault,) = faults(text, tmp_path)
    assert fault == expected or (expected.endswith(":") and fault.startswith(expected))


def test_files_that_are_no_text(tmp_path: Path) -> None:
    def fault(file: Path) -> str:
        with pytest.raises(SpecError) as caught:
            toml.load(Job, file=file, flags={}, assignments=())
        return str(caught.value).replace(f"{tmp_path}/", "")

    (tmp_path / "bytes.toml").write_bytes(b"a = '\xff'")
    assert fault(tmp_path / "bytes.toml") == "bytes.toml: is not UTF-8 text (byte 5); save it as UTF-8"
    missing = "no.toml: cannot be read: No such file or directory; give the path of a TOML file"
    assert fault(tmp_path / "no.toml") == missing
    assert "Is a directory" in fault(tmp_path)


def test_windows_files_are_read(tmp_path: Path) -> None:
    assert load('\ufeffname = "a"\r\nepochs = 2\r\n', tmp_path).epochs == 2
    assert faults('\ufeffname = "a"\r\n\r\nepocs = 2\r\n', tmp_path)[0].startswith("x.toml:3: epocs:")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab.=[]{}\"'#\\\n ,1", max_size=40))
def test_no_text_breaks_the_locator(text: str) -> None:
    locate(text)
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = syntax_fault(text, str(error)).split(":")[0]
        assert 1 <= int(line) <= text.count("\n") + 1


# --- lines of keys ---

TRICKY = '''\
# [not.a.section]
title = "a = b # [c]" # d = 1
'quoted = key' = 1
"esc\\"aped" = 2
dotted . "in.ner" . x = 3
multi = """
fake = 1
[fake]
""""
lit = \'\'\'
fake2 = \'1\'
\'\'\'\'
when = 1979-05-27 07:32:00 # x = 1
list = [ # [
  1, "]", [ "}", # ,
    \'[\' ],
  { a = 1, b = { c = [
     2 ] } },
]

[a.b] # c
x = {y = {z = 1}, "w" = "}"}
  [[a.rows]]
  k = 1
  [a.rows.sub]
  k = 2
  [[a.rows.deep]]
  m = 1
[[a.rows]]
[[a.rows.deep]]
[[a.rows.deep]]
n = """x"""
[a]
late = """ \\""" """
last = ""'''


def test_locator_on_a_tricky_file() -> None:
    tomllib.loads(TRICKY)
    lines = locate(TRICKY)
    expected = {
        ("title",): 2, ("quoted = key",): 3, ('esc"aped',): 4, ("dotted",): 5, ("dotted", "in.ner"): 5,
        ("dotted", "in.ner", "x"): 5, ("multi",): 6, ("lit",): 10, ("when",): 13, ("list",): 14, ("list", 0): 15,
        ("list", 1): 15, ("list", 2): 15, ("list", 2, 0): 15, ("list", 2, 1): 16, ("list", 3): 17,
        ("list", 3, "a"): 17, ("list", 3, "b"): 17, ("list", 3, "b", "c"): 17, ("list", 3, "b", "c", 0): 18,
        ("a",): 21, ("a", "b"): 21, ("a", "b", "x"): 22, ("a", "b", "x", "y"): 22, ("a", "b", "x", "y", "z"): 22,
        ("a", "b", "x", "w"): 22, ("a", "rows"): 23, ("a", "rows", 0): 23, ("a", "rows", 0, "k"): 24,
        ("a", "rows", 0, "sub"): 25, ("a", "rows", 0, "sub", "k"): 26, ("a", "rows", 0, "deep"): 27,
        ("a", "rows", 0, "deep", 0): 27, ("a", "rows", 0, "deep", 0, "m"): 28, ("a", "rows", 1): 29,
        ("a", "rows", 1, "deep"): 30, ("a", "rows", 1, "deep", 0): 30, ("a", "rows", 1, "deep", 1): 31,
        ("a", "rows", 1, "deep", 1, "n"): 32, ("a", "late"): 34, ("a", "last"): 35,
    }  # fmt: skip
    assert lines == expected


KEYS = st.one_of(st.sampled_from(["a", "b", "c-1", "0"]), st.text(max_size=4))
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12) | st.text("[]{}=#'\"\\\n,.", max_size=8)
LEAVES = st.one_of(st.integers(), st.floats(allow_nan=False), st.booleans(), TEXTS)
SCALARS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
TABLES = st.dictionaries(KEYS, SCALARS, max_size=5)


def paths(value: object, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path} | {deep for key, item in items for deep in paths(item, (*path, key))}


@settings(max_examples=300, deadline=None)
@given(TABLES)
def test_written_tables_parse_to_the_same_and_every_key_has_its_line(table: dict[str, object]) -> None:
    text = write(table)
    assert tomllib.loads(text) == table
    lines, rows = locate(text), text.split("\n")
    assert set(lines) == paths(table) - {()}
    for path, line in lines.items():
        names = [literal(part)[1:-1] for part in path if isinstance(part, str)]
        assert names[-1] in rows[line - 1]


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[tuple[str | int, ...], int]]:
    """Write a document by hand, keeping count of lines: multi-line strings and arrays, comments, headers."""
    rows: list[str] = []
    lines: dict[tuple[str | int, ...], int] = {}
    items = 0
    decoy = st.sampled_from(["x = 1", "[x]", "[[a]]", "# c", "'", '\\"', "}", "], k = 1", ""])
    for number in range(draw(st.integers(0, 5))):
        rows += [f"# {draw(decoy)}"] * draw(st.integers(0, 2))
        is_item = draw(st.booleans())
        section: tuple[str | int, ...] = ("rows", items) if is_item else (f"s{number}", "t")
        items += is_item
        rows.append("[[ rows ]] # ]]" if is_item else f'[s{number} . "t"]')
        for depth in (1, 2):
            lines.setdefault(section[:depth], len(rows))
        for key in draw(st.lists(st.sampled_from("abcde"), unique=True)):
            lines[(*section, key)] = len(rows) + 1
            style, inside = draw(st.integers(0, 4)), draw(decoy)
            if style == 0:
                rows.append(f'{key} = "{inside}" # {draw(decoy)}')
            elif style == 1:
                rows += [f'"{key}"="""{inside}', inside, '""""']
            elif style == 2:
                rows += [f"'{key}' = '''", inside.replace("'", "."), "''' # '''"]
            elif style == 3:
                rows += [f"{key} = [ # {draw(decoy)}", f'  "{inside}",', "]"]
                lines[(*section, key, 0)] = len(rows) - 1
            else:
                rows.append(f'{key} = {{ u.v = [1.5], w = "{inside}" }}')
                for deep in (("u",), ("u", "v"), ("u", "v", 0), ("w",)):
                    lines[(*section, key, *deep)] = len(rows)
    return "\n".join(rows), lines


@settings(max_examples=200, deadline=None)
@given(documents())
def test_locator_counts_lines_in_any_document(document: tuple[str, dict[tuple[str | int, ...], int]]) -> None:
    text, lines = document
    assert paths(tomllib.loads(text)) - {()} == set(lines)
    assert locate(text) == lines


# --- writing ---

FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TERMS = st.one_of(
    st.builds(Soft, region=TEXTS, weight=st.floats(min_value=1e-300, allow_infinity=False), soft=st.integers()),
    st.builds(Hard, margin=st.integers(), tags=st.lists(TEXTS, max_size=3).map(tuple)),
)
NETS = st.builds(Net, depth=st.sampled_from([18, 50]), width=FLOATS, norm=st.sampled_from([None, "frozen"]))
JOBS = st.builds(
    Job,
    name=TEXTS,
    epochs=st.integers(min_value=1),
    lr=FLOATS,
    verbose=st.booleans(),
    output=st.none() | st.sampled_from(["a/b", "/c d", 'e"f']).map(Path),
    sizes=st.tuples(st.integers(), st.integers()),
    grid=st.lists(st.lists(FLOATS, max_size=3).map(tuple), max_size=3).map(tuple),
    net=NETS,
    ema=st.none() | st.builds(Ema, decay=st.floats(0.1, 0.9), ramp=st.integers() | st.just("auto")),
    terms=st.lists(TERMS, max_size=3).map(tuple),
    best=st.none() | TERMS,
    labels=st.dictionaries(KEYS, st.integers(), max_size=3),
    nets=st.dictionaries(KEYS, NETS, max_size=2),
)


@settings(max_examples=200, deadline=None)
@given(JOBS)
def test_what_is_written_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, job: Job) -> None:
    file = tmp_path_factory.mktemp("spec") / "x.toml"
    file.write_text(toml.dumps(job), encoding="utf-8")
    again = toml.load(Job, file=file, flags={}, assignments=())
    assert again == job
    assert toml.dumps(again) == toml.dumps(job)


def test_what_is_written_reads_well() -> None:
    job = Job(name="a", lr=1e-5, ema=Ema(decay=0.9), grid=((1.0, 2.5), ()), terms=(Soft(), Hard(margin=1, tags=("x",))))
    assert (
        toml.dumps(job)
        == """\
name = "a"
epochs = 12
lr = 1e-05
verbose = false
sizes = [1, 2]
grid = [[1.0, 2.5], []]

[net]
depth = 50
width = 1.0

[ema]
decay = 0.9
ramp = "auto"

[labels]

[nets]

[[terms]]
kind = "soft"
region = "main"
weight = 1.0
soft = 0

[[terms]]
kind = "hard"
margin = 1
tags = ["x"]
"""
    )


def test_a_none_that_is_no_default_cannot_be_written() -> None:
    class Odd(Spec):
        count: int | None = 3

    assert toml.dumps(Odd(count=3)) == "count = 3\n"
    with pytest.raises(AssertionError, match="None has to be the default"):
        toml.dumps(Odd(count=None))


def test_a_missing_section_is_named_as_one(tmp_path: Path) -> None:
    class Outer(Spec):
        ema: Ema

    with pytest.raises(SpecError, match=r"^ema: missing; add a section \[ema\]$"):
        toml.load(Outer, file=None, flags={}, assignments=())
