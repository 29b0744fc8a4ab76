"""docs/map.md draws the package as it is: its entries, its floors, its contracts, and the one place of each hazard."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOPD = ROOT / "lopd"
MAP = (ROOT / "docs" / "map.md").read_text()
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
MODULES = sorted(LOPD.rglob("*.py"))

pytestmark = pytest.mark.docs


def rows_under(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without its head."""
    section = MAP.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in section.splitlines() if line.startswith("| ")]
    return rows[1:]


def entries() -> list[str]:
    """Return the entries at the top of the package: folders with a slash, and files."""
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in LOPD.iterdir() if path.name != "__pycache__")


FLOORS = [(int(floor), entry.strip("`")) for floor, entry, _ in rows_under("Floors")]
HAZARDS = [(place.strip("`"), sign.strip("`")) for _, place, sign in rows_under("Where each hazard has its one place")]


def test_every_entry_of_the_package_is_on_the_map_and_nothing_else() -> None:
    beside = [name for name in ("__init__.py", "__main__.py", "py.typed") if f"`{name}`" in MAP]
    assert sorted([entry for _, entry in FLOORS] + beside) == entries()


def test_the_floors_are_those_of_the_import_contracts() -> None:
    (contract,) = [contract for contract in CONTRACTS if contract.get("containers") == ["lopd"]]
    layers = [sorted(layer.split(" | ")) for layer in contract["layers"]]
    drawn = {floor: sorted(re.sub(r"/|\.py", "", entry) for at, entry in FLOORS if at == floor) for floor, _ in FLOORS}
    assert list(drawn) == sorted(drawn, reverse=True)
    assert list(drawn.values()) == layers


def test_the_picture_has_the_floors_of_the_table() -> None:
    boxes = re.findall(r'class="code" x="\d+" y="(\d+)"[^>]*>([^<]+)<', (ROOT / "docs" / "map.svg").read_text())
    heights = sorted({int(y) for y, _ in boxes}, reverse=True)
    picture = sorted((heights.index(int(y)) + 1, name) for y, name in boxes)
    assert picture == sorted((floor, re.sub(r"/|\.py", "", entry)) for floor, entry in FLOORS)


def test_the_map_names_every_import_contract() -> None:
    assert [name for name, _ in rows_under("Import contracts")] == [contract["name"] for contract in CONTRACTS]


@pytest.mark.parametrize(("place", "sign"), HAZARDS)
def test_a_hazard_is_in_its_one_place_and_nowhere_else(place: str, sign: str) -> None:
    found = [path for path in MODULES if sign in path.read_text() and not path.is_relative_to(LOPD / "testing")]
    assert [str(path.relative_to(ROOT)) for path in found] == [place]


def test_pages_and_examples_import_from_packages_and_the_modules_that_the_map_calls_public() -> None:
    public = set(re.findall(r"`(lopd\.[\w.]+)`", MAP.split("except these:")[1].split("\n\n")[0]))
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
    imported = {name for page in pages for name in re.findall(r"^\s*(?:from|import) (lopd[\w.]*)", page.read_text(), re.MULTILINE)}
    folders = {name for name in imported if (ROOT / name.replace(".", "/")).is_dir()}
    assert imported - folders - public == {"lopd.errors"}


def test_pages_and_examples_load_tokenizers_as_lopd_does() -> None:
    pages = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.py")]
    found = [page.name for page in pages if "AutoTokenizer.from_pretrained(" in page.read_text()]
    assert found == ["smollm2.py"], "which reads a GGUF"


def test_the_top_of_the_package_has_at_most_twelve_entries_with_code() -> None:
    assert len([name for name in entries() if name != "py.typed"]) <= 12


def test_a_file_has_at_most_300_lines_and_one_of_tests_500() -> None:
    limits = dict.fromkeys(MODULES, 300) | dict.fromkeys((ROOT / "tests").glob("*.py"), 500)
    sizes = {path: len(path.read_text().splitlines()) for path in limits}
    assert {str(path.relative_to(ROOT)): lines for path, lines in sizes.items() if lines > limits[path]} == {}


def test_a_class_has_at_most_12_public_methods_unless_it_is_a_store_or_a_suite() -> None:
    public = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            # the face of the durable stores is a class that they share
            if isinstance(node, ast.ClassDef) and not node.name.endswith(("Store", "DurableBase", "Conformance")):
                names = [part.name for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
                public[f"{path.relative_to(ROOT)}: {node.name}"] = len([name for name in names if not name.startswith("_")])
    assert {name: methods for name, methods in public.items() if methods > 12} == {}


def imports(folder: Path) -> dict[str, set[str]]:
    """Return module -> the modules of the same folder that it imports, wherever in the file."""
    paths = {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in folder.rglob("*.py")
    }
    prefix = f"{folder.name}."  # scripts import one another by their bare names
    found: dict[str, set[str]] = {}
    for name, path in paths.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        named = [
            f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) and node.module for alias in node.names
        ]
        named += [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        candidates = [(one, prefix + one, one.rpartition(".")[0], prefix + one.rpartition(".")[0]) for one in named]
        found[name] = {next((own for own in several if own in paths), name) for several in candidates} - {name}
    return found


@pytest.mark.parametrize("folder", ["lopd", "benchmarks", "examples"])
def test_no_imports_go_in_a_circle(folder: str) -> None:
    left = imports(ROOT / folder)
    assert len(left) > 10
    while free := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert left == {}
