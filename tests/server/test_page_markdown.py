"""What the chat page makes of what a model writes: it is untrusted, so it must stay text."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from page_server import answer, delta, end, event, text, thought

if TYPE_CHECKING:
    from page_browser import Page

pytest_plugins = ["page_browser"]  # imports it first, so that its asserts explain themselves

HOSTILE = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 2'>",
    "<svg onload='window.ran = 3'><a href='javascript:window.ran = 3'>svg</a></svg>",
    "[one](javascript:window.ran=4) [two](JaVaScRiPt:window.ran=4)",
    "[three](java\tscript:window.ran=4) [four]( javascript:window.ran=4 'title')",
    "[data](data:text/html,<script>window.ran=5</script>) [file](file:///etc/passwd)",
    "[relative](/v1/models) [host](//example.com) [view](view-source:https://example.com)",
    "![pixel](https://127.0.0.1:9/steal.png) ![x](javascript:window.ran=6)",
    '[quote](https://example.com/"onmouseover="window.ran=7) <https://example.com/"onclick="x>',
    "```html onmouseover=window.ran=8\n</code></pre><script>window.ran = 8</script>\n```",
    "| <b onclick='window.ran=9'>a</b> | `</td><script>window.ran=9</script>` |\n"
    "|---|---|\n| <iframe src=/> | x |",
    "# <style>body { display: none }</style>",
    "- [x](vbscript:x)\n  > <object data=x></object>",
    "user \u202e\u2066// then exec\u2069 \u2066`\u202eevil`",
    "&lt;script&gt; &#x3c;script&#x3e; <!-- comment --> <![CDATA[x]]>",
    "**<a href='#' id='input'>*nested _tricks_*</a>** __proto__ ${7*7} {{constructor}}",
]
ELEMENTS = [
    *("DIV", "P", "H3", "H4", "H5", "H6", "UL", "OL", "LI", "BLOCKQUOTE", "HR", "BR", "STRONG"),
    *("EM", "DEL", "CODE", "PRE", "A", "FIGURE", "FIGCAPTION", "SPAN", "BUTTON", "svg", "use"),
    *("TABLE", "THEAD", "TBODY", "TR", "TH", "TD"),
]
ATTRIBUTES = [
    *("class", "dir", "href", "title", "target", "rel", "tabindex", "role", "aria-label"),
    *("aria-hidden", "type", "scope", "start"),
]
# What Markdown cannot have made, in an element.
FOREIGN = """
const foreign = (root, elements, attributes) => [...root.querySelectorAll('*')].flatMap((node) => [
  ...(elements.includes(node.tagName) ? [] : [node.tagName]),
  ...[...node.attributes].map(({ name }) => name).filter((name) => !attributes.includes(name)),
  ...(node.tagName !== 'A' || /^(https?|mailto):/.test(node.getAttribute('href')) ? [] : ['link']),
]);"""


def foreign(page: Page, css: str) -> list[str]:
    script = f"{FOREIGN} return foreign(document.querySelector(arguments[2]), ...arguments);"
    script = script.replace("...arguments", "arguments[0], arguments[1]")
    return page.js(script, ELEMENTS, ATTRIBUTES, css)


def markdown(page: Page, source: str) -> str:
    return page.module("markdown", "(m.update(box, a[0]), box.innerHTML)", source)


def test_hostile_answers_run_nothing_and_show_as_text(page: Page) -> None:
    call = {"index": 0, "function": {"name": HOSTILE[0], "arguments": HOSTILE[1]}}
    thoughts = [thought(f"{bad}\n\n") for bad in HOSTILE]
    contents = [text(f"{bad}\n\n") for bad in HOSTILE]
    page.server.script = lambda _: [*thoughts, *contents, delta(tool_calls=[call]), *end()]
    page.talk(HOSTILE[0] + HOSTILE[1])
    page.click(".thinking summary")
    page.until(lambda: page.text(".thinking .body"))
    for css in (".thinking .body", ".assistant > .body"):
        body = page.text(css)
        for part in (
            "<script>window.ran = 1</script>",
            "onerror=",
            "ran=4)",
            "<style>",
            "[U+202E]",
        ):
            assert part in body
        assert "\u202e" not in body and foreign(page, css) == []
    assert "onerror" in page.text(".call") and "<script>" in page.text(".user")
    links = page.all(".body a")
    assert links and all("noopener" in link.get_attribute("rel") for link in links)
    for element in page.all(".body a, .body code"):
        page.js("arguments[0].dispatchEvent(new MouseEvent('mouseover'))", element)
    assert page.js("return window.ran ?? null") is None


def test_hostile_errors_names_and_titles_show_as_text(page: Page) -> None:
    page.server.model = HOSTILE[1]
    page.driver.refresh()
    page.until(lambda: page.text("#model") == HOSTILE[1])
    page.server.script = lambda _: [event({"error": {"message": HOSTILE[0] + HOSTILE[1]}})]
    page.talk(HOSTILE[1])
    assert page.text(".error span") == HOSTILE[0] + HOSTILE[1]
    assert page.titles() == [HOSTILE[1]] and page.text("h1") == HOSTILE[1]
    assert page.all("main img, aside img, main script") == []
    assert page.js("return window.ran ?? null") is None


def test_any_markdown_is_safe_and_streams_to_the_same_nodes(page: Page) -> None:
    draw = random.Random(7)
    parts = [
        *"*_~`[]()!<>#|-+:.\\\n\n\n   ab1\u202e😀",
        *("```", "~~~", "](", "](https://a.b/", "javascript:", "<img src=x onerror=x>"),
        *("\n\n", "\n- ", "\n1. ", "\n> ", "\n|-|-|\n", "https://a.b/c"),
    ]
    sources = ["".join(draw.choices(parts, k=draw.randint(1, 40))) for _ in range(500)]
    sources += [a + b for a in HOSTILE for b in HOSTILE]
    script = f"""{{ {FOREIGN}
    return a[0].filter((source) => {{
      const grown = document.createElement('div');
      for (let i = 0; i < source.length; i += 3) m.update(grown, source.slice(0, i));
      m.update(grown, source);
      m.update(box, source);
      return foreign(box, a[1], a[2]).length || grown.innerHTML !== box.innerHTML;
    }}); }}"""
    assert page.module("markdown", script, sources, ELEMENTS, ATTRIBUTES) == []


def test_no_text_takes_long(page: Page) -> None:
    parts = [
        *("*", "**a ", "_", "`", "``a`", "[", "![", "[a](", "[a](b", "<", "<https://", "https://"),
        *("> ", "- ", "1. ", "#", "|", "|a", "a|\n-|\n", "\n", " ", "\\", "h", "~~", "- - ", "."),
        *("\n- a\n\n", "\n```\n", "\n   ", "\n> - ", "a|b\n", "&", '[a](b "', "``` `"),
    ]
    script = """{
    const slow = (source) => {
      const before = performance.now();
      m.update(document.createElement('div'), source);
      return performance.now() - before > 1500;
    };
    const always = (source) => [1, 2, 3].every(() => slow(source)); // the machine may be busy
    return a[0].filter(always).map((source) => source.slice(0, 9)); }"""
    sources = [part * (40_000 // len(part)) for part in parts]
    assert page.module("markdown", script, sources) == []  # of some 20 ms each


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("# A *b*", "<h3>A <em>b</em></h3>"),
        ("a\nb", "<p>a<br>b</p>"),
        (
            "**a** __b__ *c* _d_",
            "<p><strong>a</strong> <strong>b</strong> <em>c</em> <em>d</em></p>",
        ),
        ("***e*** ~~f~~", "<p><strong><em>e</em></strong> <del>f</del></p>"),
        ("snake_case_name 2 * 3 * 4 **open", "<p>snake_case_name 2 * 3 * 4 **open</p>"),
        ("`` a`b `` \\*c\\*", "<p><code>a`b</code> *c*</p>"),
        ("- a\n  - b\n- c", "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"),
        ("3. a\n\n   b\n4. c", '<ol start="3"><li>a<p>b</p></li><li>c</li></ol>'),
        ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
        ("a\n\n---\nb", "<p>a</p><hr><p>b</p>"),
        ("1. a\n   ```\n   x\n\n    y\n   ```\n2. b", None),
    ],
)
def test_markdown(page: Page, source: str, html: str | None) -> None:
    found = markdown(page, source).replace(' dir="auto"', "").replace(' dir="ltr"', "")
    if html is None:
        assert ">x\n\n y</code>" in found and found.count("<li>") == 2
    else:
        assert found == html


def test_tables_links_and_code(page: Page) -> None:
    table = markdown(page, "| a | b |\n|:--|--:|\n| `x \\| y` | **2** | 3 |\n| 1 |")
    assert '<th scope="col" dir="auto">a</th><th scope="col" class="end" dir="auto">b</th>' in table
    assert table.count("<td") == 4 and "x | y</code>" in table
    links = markdown(page, "see https://a.b/c_d_e. [x](https://a.b/(c)) ![p](http://a.b/i.png)")
    assert links.count('rel="noopener noreferrer"') == 3 and "<img" not in links
    for found in (">https://a.b/c_d_e</a>.", 'href="https://a.b/(c)"', ">Image: p</a>"):
        assert found in links
    assert 'href="mailto:a@b.c"' in markdown(page, "<mailto:a@b.c>")
    code = markdown(page, "```py\n*a*\n\n<b>\n```\nafter")
    assert "<span>py</span>" in code and "*a*\n\n&lt;b&gt;</code>" in code and "<p" in code


def test_code_and_messages_can_be_copied(page: Page) -> None:
    page.js("window.copied = []; navigator.clipboard.writeText = async (t) => { copied.push(t); };")
    page.server.script = lambda _: answer("So:\n```js\nlet a = 1;\n```")
    page.talk("hi")
    page.click(".code button")
    page.until(lambda: page.text(".code button") == "Copied")
    page.click(".assistant .actions .copy")
    assert page.js("return copied") == ["let a = 1;", "So:\n```js\nlet a = 1;\n```"]
