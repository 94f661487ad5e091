"""Names, tooltips and help pages in every language: complete, without leftovers, and served.

After a change to a node: RENEW_NODES=1 python3 dev/run.py test tests/pack/test_locales.py writes the English file from
the nodes; the other languages are written by hand, and these tests name what is missing.
"""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCALES, DOCS = ROOT / "locales", ROOT / "web" / "docs"
ENGLISH = "en"
LANGUAGES = sorted(path.name for path in LOCALES.iterdir())
TRANSLATIONS = [language for language in LANGUAGES if language != ENGLISH]
RENEW = "RENEW_NODES"
CODE = re.compile(r"`[^`]+`")
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def definitions(language: str) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def explained(name: str, tooltip: str | None) -> dict[str, str]:
    return {"name": name} | ({"tooltip": tooltip} if tooltip else {})


def english(schema: dict) -> dict:
    """What the frontend may replace of a node, in the words of the node itself."""
    inputs = {}
    for group, names in schema["input_order"].items():
        for name in names if group != "hidden" else ():
            options = (*schema["input"][group][name], {})[1]
            inputs[name] = explained(options.get("display_name") or name, options.get("tooltip"))
    tooltips = schema.get("output_tooltips") or [None] * len(schema["output"])
    outputs = zip(schema["output_name"], tooltips, strict=True)
    return {
        "display_name": schema["display_name"],
        "description": schema["description"],
        "inputs": inputs,
        "outputs": {str(number): explained(*output) for number, output in enumerate(outputs)},
    }


def texts(value: dict, path: tuple = ()) -> dict[tuple, str]:
    """All texts of nested dictionaries, by their path."""
    found = {}
    for key, inner in value.items():
        found |= texts(inner, (*path, key)) if isinstance(inner, dict) else {(*path, key): inner}
    return found


@pytest.fixture(scope="module")
def spoken(comfy, pack_nodes) -> dict:
    """What the English file must hold, from the running server."""
    schemas = comfy.client.object_info()
    expected = {node: english(schemas[node]) for node in pack_nodes}
    if os.environ.get(RENEW):
        file = LOCALES / ENGLISH / "nodeDefs.json"
        file.write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return expected


def test_english_is_what_the_nodes_say(spoken):
    assert definitions(ENGLISH) == spoken, f"{RENEW}=1 python3 dev/run.py test tests/pack/test_locales.py renews it"


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_translations_are_complete_and_have_no_leftovers(spoken, language):
    expected, found = texts(spoken), texts(definitions(language))
    missing = sorted(".".join(path) for path in expected.keys() - found.keys())
    leftover = sorted(".".join(path) for path in found.keys() - expected.keys())
    assert (missing, leftover) == ([], [])
    assert all(text.strip() for text in found.values())


def test_chinese_is_chinese():
    plain = {path for path, text in texts(definitions("zh")).items() if not CHINESE.search(text)}
    assert {path[-1] for path in plain} <= {"name"}, "only terms such as VAE and Shift stay as they are"


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_values_to_choose_keep_their_names(spoken, language, comfy):
    """The frontend does not translate the options of a menu, so a tooltip that explains one must name it as it is."""
    schemas, translated = comfy.client.object_info(), texts(definitions(language))
    for path, text in texts(spoken).items():
        if path[1] != "inputs" or path[-1] != "tooltip":
            continue
        node, name = path[0], path[2]
        groups = schemas[node]["input"]
        spec = next(groups[group][name] for group in groups if name in groups[group])
        for option in (*spec, {})[1].get("options") or ():
            if re.search(rf"\b{re.escape(str(option))}\b", text):
                assert str(option) in translated[path], (path, option)


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_shown_as_they_are(language):
    """vue-i18n reads braces, @ and | as instructions of its own."""
    broken = {path: text for path, text in texts(definitions(language)).items() if set(text) & set("{}@|")}
    assert broken == {}


def test_the_server_hands_them_out(comfy, spoken, pack_nodes):
    served = comfy.client.get("/i18n")
    for language in LANGUAGES:
        assert served[language]["nodeDefs"].keys() >= set(pack_nodes)
        for node, entry in definitions(language).items():
            assert served[language]["nodeDefs"][node] == entry


def pages(node: str) -> list[str]:
    """A node's help pages below web/: the frontend asks for NODE/LANGUAGE.md, then for NODE.md, which is English."""
    return [f"docs/{node}.md", *(f"docs/{node}/{language}.md" for language in TRANSLATIONS)]


def test_every_node_has_help_in_every_language(comfy, pack_nodes):
    for node in pack_nodes:
        for page in pages(node):
            assert comfy.client.request(f"/extensions/wan_s2v/{page}") == (ROOT / "web" / page).read_bytes()
    found = {path.relative_to(ROOT / "web").as_posix() for path in DOCS.rglob("*.md")}
    assert found == {page for node in pack_nodes for page in pages(node)}


def test_help_pages_say_the_same(spoken):
    """Pages name every input of their node; translated ones explain the same, by the names that workflows have too."""
    for node, entry in spoken.items():
        original = (DOCS / f"{node}.md").read_text(encoding="utf-8")
        assert original.startswith(f"# {entry['display_name']}\n")
        assert [name for name in entry["inputs"] if not re.search(rf"\b{name}\b", original)] == [], node
        for language in TRANSLATIONS:
            page = (DOCS / node / f"{language}.md").read_text(encoding="utf-8")
            assert page.startswith(f"# {definitions(language)[node]['display_name']}\n"), (node, language)
            rows = [text.count("\n| ") for text in (original, page)]
            assert rows[0] == rows[1], (node, language)
            told = {name for name in entry["inputs"] if "_" in name and name in original}
            assert {name for name in told if name not in page} == set(), (node, language)
            codes = set(CODE.findall(original)) - set(entry["inputs"])
            assert {code for code in codes if code not in page} == set(), (node, language)
