"""Texts of the reference MoE: Python standard library source and prose of the Rust book.

Every document is put in one split by the hash of its name, so held-out documents are in no
other text. Writes ``train.txt`` (not kept), ``calibration.txt``, ``heldout_code.txt`` and
``heldout_prose.txt``.
"""

import argparse
import ast
import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

PARAGRAPH_TAGS = {"p", "li", "h1", "h2", "h3", "h4", "blockquote", "tr"}
SEPARATOR = "<|endoftext|>"
SKIPPED_PARTS = {"site-packages", "encodings", "lib-dynload", "__pycache__", "pydoc_data"}
SKIPPED_PARTS |= {"test", "tests", "idle_test"}
HELDOUT_SHARE = 0.06
CALIBRATION_CHARS = 1_000_000
HELDOUT_CHARS = 300_000
LONGEST_HELDOUT_CHARS = 60_000


def hash_unit(name: str) -> float:
    """Return a number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def is_prose_or_code(text: str) -> bool:
    """Tell text from tables: few digits, few characters outside ASCII, no endless lines."""
    if len(text) < 400:
        return False
    digits = sum(c.isdigit() for c in text) / len(text)
    foreign = sum(ord(c) > 127 for c in text) / len(text)
    return digits < 0.1 and foreign < 0.02 and len(text) / (text.count("\n") + 1) < 120


def python_sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the standard library's modules, tests and tables left out."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PARTS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if SEPARATOR not in text and is_prose_or_code(text):
            yield relative.as_posix(), text


def pydoc_topics(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the language reference's topics, decoded from their dict."""
    tree = ast.parse((root / "pydoc_data" / "topics.py").read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    for topic, text in sorted(ast.literal_eval(table).items()):
        if is_prose_or_code(text):
            yield f"topics/{topic}", text


class ProseParser(HTMLParser):
    """Collects the text of ``<main>`` without code blocks and page furniture."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.inside = 0
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Enter main or a hidden element; start a paragraph."""
        self.inside += tag == "main"
        self.hidden += tag in ("pre", "script", "style")
        if tag in PARAGRAPH_TAGS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        """Leave main or a hidden element."""
        self.inside -= tag == "main"
        self.hidden -= tag in ("pre", "script", "style")

    def handle_data(self, data: str) -> None:
        """Keep visible text as one line."""
        if self.inside and not self.hidden:
            self.parts.append(data.replace("\n", " "))


def html_prose(html: str) -> str:
    """Return a page's paragraphs, one per line, with an empty line between them."""
    parser = ProseParser()
    parser.feed(html)
    paragraphs = [" ".join(p.split()) for p in "".join(parser.parts).split("\n\n")]
    return "\n\n".join(p for p in paragraphs if p)


def book_chapters(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, prose) of the book's numbered pages; pages that only redirect are short."""
    for path in sorted(root.glob("ch*.html")):
        text = html_prose(path.read_text(encoding="utf-8"))
        if len(text) > 2000:
            yield path.name, text


def shuffled(documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Order documents by a second hash of their names."""
    return sorted(documents, key=lambda document: hash_unit("order/" + document[0]))


def take(documents: list[tuple[str, str]], chars: int, longest: int) -> list[str]:
    """Take texts up to ``longest`` characters until they hold ``chars`` together."""
    taken: list[str] = []
    for _, text in documents:
        if sum(map(len, taken)) >= chars:
            break
        if len(text) <= longest:
            taken.append(text)
    return taken


def is_heldout(name: str) -> bool:
    """Hold out a fixed share of the modules."""
    return not name.startswith("topics/") and hash_unit(name) < HELDOUT_SHARE


def build(stdlib: Path, book: Path) -> dict[str, list[str]]:
    """Return the documents of every text by file name."""
    documents = list(python_sources(stdlib)) + list(pydoc_topics(stdlib))
    unique = list({text: (name, text) for name, text in documents}.values())
    training = shuffled([d for d in unique if not is_heldout(d[0])])
    heldout = shuffled([d for d in unique if is_heldout(d[0])])
    return {
        "train.txt": [text for _, text in training],
        "calibration.txt": take(training, CALIBRATION_CHARS, LONGEST_HELDOUT_CHARS),
        "heldout_code.txt": take(heldout, HELDOUT_CHARS, LONGEST_HELDOUT_CHARS),
        "heldout_prose.txt": take(list(book_chapters(book)), HELDOUT_CHARS, 10**6),
    }


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--book", type=Path, required=True, help="html folder of the Rust book")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--train-out", type=Path, required=True, help="where train.txt goes")
    options = parser.parse_args()
    for name, texts in build(options.root, options.book).items():
        folder = options.train_out if name == "train.txt" else options.out
        folder.mkdir(parents=True, exist_ok=True)
        glue = SEPARATOR if name == "train.txt" else "\n\n"
        (folder / name).write_text(glue.join(texts), encoding="utf-8")
        print(name, len(texts), "documents", sum(map(len, texts)), "characters")


if __name__ == "__main__":
    main()
