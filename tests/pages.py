"""Pages in a headless browser without a network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
NASTY = (
    '</script><script>document.title="broken"</script><img src="http://nowhere.invalid/x.png" onerror="boom()">&amp;'
)
DARK = "--blink-settings=preferredColorScheme=0"


class Tags(HTMLParser):
    """A page's tags with their attributes, and the text that is read."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem is None:
            self.text += data

    @property
    def sections(self):
        return [attrs["id"] for tag, attrs in self.found if tag == "section"]


def harmless(page):
    """Texts are texts, and nothing is loaded."""
    tags = Tags(page)
    assert not [tag for tag, attrs in tags.found if tag in ("img", "link", "iframe", "base") or "src" in attrs]
    assert [tag for tag, _ in tags.found].count("script") == 3
    assert not [attrs for _, attrs in tags.found if any(name.startswith("on") for name in attrs)]
    policy = next(attrs["content"] for _, attrs in tags.found if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def probing(body):
    """A script that runs `body` when the plots are drawn, and leaves what it has put into `seen`."""
    return f"""
<script>
const wait = setInterval(async () => {{
  if (!document.body.dataset.drawn) return;
  clearInterval(wait);
  const marks = (name, kind) => document.querySelectorAll(`#plot-${{name}} svg .${{kind}}.role-mark path`).length;
  const seen = {{
    title: document.title,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    paper: getComputedStyle(document.body).backgroundColor,
  }};
  {body}
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(seen);
  top.document.body.append(out);
}}, 50);
</script>
"""


def visit(page, folder, probe, *options, width=1280):
    """What the probe saw, what the browser's console said, and every address that was asked for."""
    file, log = folder / "report.html", folder / "net.json"
    whole, end, rest = page.rpartition("</body>")
    file.write_text(whole + probe + end + rest)
    address = file
    if width < 500:  # windows are no narrower
        address = folder / "narrow.html"
        address.write_text(f'<iframe src="report.html" style="width:{width}px;height:800px;border:0"></iframe>')
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=20000",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},900", f"--log-net-log={log}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--allow-file-access-from-files", *options,
            "--dump-dom", address.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found, (done.stdout[-500:], done.stderr[-2000:])
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    # Chromium's own requests have no page that they are made for.
    pattern = r'site=file://.*?"url":"((?!file:|data:|blob:)[^"]+)"'
    asked = {address for line in log.read_text().splitlines() for address in re.findall(pattern, line)}
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")), console, asked


def contrast(paper, ink):
    """The sums of the channels of two colours as a browser gives them."""
    return [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (paper, ink)]
