"""html_page: the frame of the page, its style and its script.

Nothing is fetched: a policy in the page forbids it.
"""

from collections.abc import Sequence
from html import escape

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)

_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1f24;--faint:#5c6570;
--rule:#d5dae0;--link:#0b57d0}
@media (prefers-color-scheme:dark){:root{--ground:#14171b;--ink:#e8eaed;
--faint:#a5adb7;--rule:#363c44;--link:#8ab4f8}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1rem;padding:0;list-style:none}
a{color:var(--link)}
.wide{overflow-x:auto;max-width:100%}
svg .bytes{stroke:var(--ground);stroke-width:4px}
table{border-collapse:collapse;font-size:.9rem}
caption{position:absolute;width:1px;height:1px;overflow:hidden;
clip-path:inset(50%)}
td{white-space:nowrap}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--rule);text-align:left;
vertical-align:top}
.n{text-align:right;font-variant-numeric:tabular-nums}
thead th{color:var(--faint);font-weight:600;position:sticky;top:0;
background:var(--ground)}
th button{font:inherit;color:inherit;background:none;border:0;padding:.2rem 0;
cursor:pointer}
th[aria-sort=ascending] button::after{content:" \\2191"}
th[aria-sort=descending] button::after{content:" \\2193"}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
tbody th{font-weight:400}
.ran{display:block;white-space:nowrap;padding:0 .4rem;border-radius:.25rem}
@media print{.wide{overflow:visible}nav{display:none}}
"""

_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" ||
      (!head.hasAttribute("aria-sort") && !head.classList.contains("n"));
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const number = head.classList.contains("n");
    const key = row => {
      const text = row.cells[i].textContent;
      return number ? (text === "?" ? -1 : +text.replaceAll(",", "")) : text;
    };
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort(([a], [b]) => (number ? a - b : a.localeCompare(b)) * (up ? 1 : -1));
    body.append(...rows.map(([, row]) => row));
  }));
}
"""


def framed(title: str, top: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of sections under a head, with links to each."""
    links = "".join(
        f'<li><a href="#part-{i}">{escape(name)}</a></li>'
        for i, (name, _) in enumerate(sections)
    )
    body = "".join(
        f'<section aria-labelledby="part-{i}"><h2 id="part-{i}">'
        f"{escape(name)}</h2>{text}</section>"
        for i, (name, text) in enumerate(sections)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<main><h1>{escape(title)}</h1>{top}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>{body}</main>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
