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
h1{font-size:1.6rem;margin:.5rem 0}
.subject{color:var(--faint);margin:0}
.answers{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;
margin:.75rem 0}
.answers dt{font-weight:600}.answers dd{margin:0;overflow-wrap:anywhere}
@media (max-width:40rem){.answers{display:block}.answers dd{margin:0 0 .4rem}}
#filter{font:inherit;width:min(100%,24rem);padding:.25rem .5rem;color:inherit;
background:var(--ground);border:1px solid var(--faint);border-radius:.25rem}
details{border-top:1px solid var(--rule)}
summary{cursor:pointer;padding:.35rem 0}
summary h2{display:inline;font-size:1.05rem;margin:0}
summary .n{color:var(--faint)}
a{color:var(--link)}
.wide{overflow:auto;max-width:100%;max-height:80vh}
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
@media print{.wide{overflow:visible;max-height:none}#filter{display:none}}
"""

_SCRIPT = """
const rows = [...document.querySelectorAll("details tbody tr")]
  .map(row => [row, row.textContent.toLowerCase()]);
document.querySelector("#filter").addEventListener("input", event => {
  const wanted = event.target.value.toLowerCase();
  rows.forEach(([row, text]) => row.hidden = !text.includes(wanted));
  for (const part of document.querySelectorAll("details")) {
    const own = [...part.querySelectorAll("tbody tr")];
    if (own.length && wanted)
      part.open = own.length < 500 && own.some(row => !row.hidden);
  }
});
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => head.firstChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending" ||
      (!head.hasAttribute("aria-sort") && !head.classList.contains("n"));
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const number = head.classList.contains("n");
    const key = row => {
      const text = row.cells[i].dataset.n || row.cells[i].textContent;
      return number ? (text === "?" ? -1 : +text.replaceAll(",", "")) : text;
    };
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort(([a], [b]) => (number ? a - b : a.localeCompare(b)) * (up ? 1 : -1));
    body.append(...rows.map(([, row]) => row));
  }));
}
"""


def framed(title: str, top: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of a head and sections that unfold.

    Args:
      title: above all.
      top: HTML of what is seen first.
      sections: titles, and HTML of what is below each.
    """
    body = "".join(
        f"<details><summary><h2>{escape(name)}</h2>{_rows(text)}</summary>"
        f"{text}</details>"
        for name, text in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<main><h1>{escape(title)}</h1>{top}"
        '<p><label>Filter <input id="filter" type="search" '
        f'placeholder="layer, device, tensor"></label></p>{body}</main>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def _rows(text: str) -> str:
    """How many rows are below."""
    count = text.count("<tr>") - text.count("<thead>")
    return f' <span class="n">{count:,}</span>' if count > 0 else ""
