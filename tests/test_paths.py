"""The paths of the endpoints, and the paths that they cannot have."""

from __future__ import annotations

import re
import subprocess
from urllib.parse import quote, urljoin

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrace_exporter.state import State
from dtrace_exporter.web import handlers, paths
from dtrace_exporter.web.paths import Mount, mount
from exporter_process import EXPORTER
from web_serving import no_reload


@pytest.mark.parametrize(
    "path",
    [
        *("", "metrics", "/metrics?x", "/metrics#x", "/metrics%41", "/a b", "/a\\b", "/\u00e9"),
        *("/", "/-/healthy", "/-/ready", "/-/reload"),
        *("//metrics", "/a//b", "/./metrics", "/a/..", "/../metrics", "/metrics\n", '/"><script>'),
    ],
)
def test_bad_telemetry_path(path: str) -> None:
    """A path that no client asks for, or that is taken, is refused with an error that names it."""
    with pytest.raises(ValueError, match=r"^--web.telemetry-path: expected a path .*") as caught:
        handlers.application(State(), no_reload, path)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize(
    "path", ["/m", "/metrics", "/metrics/", "/a.b+c/d", "/.../..a", "/-/", "/a:b"]
)
def test_good_telemetry_path(path: str) -> None:
    """Any other path is accepted."""
    handlers.application(State(), no_reload, path)


@given(st.text(st.sampled_from("/.-aZ0~%?#:@ \\\u00e9"), max_size=8).map("/".__add__))
def test_paths_are_asked_for_as_they_are(path: str) -> None:
    """A path is good if clients neither quote nor shorten it, nor take a part for a query."""
    kept = (
        quote(path, safe="/~!$&'()*+,;=:@") == path
        and urljoin("http://h/x/", path) == f"http://h{path}"
    )
    try:
        paths.telemetry(path, frozenset("/"))
    except ValueError:
        good = False
    else:
        good = True
    assert good == (kept and "//" not in path and path != "/")


@pytest.mark.parametrize(
    ("external", "prefix", "expected"),
    [
        ("", "", Mount()),
        ("", "/", Mount()),
        ("", "/sub", Mount("/sub")),
        ("", "sub/", Mount("/sub")),
        ("", "/a/b/", Mount("/a/b")),
        ("http://proxy.example", "", Mount("", "http://proxy.example")),
        ("http://proxy.example/", "", Mount("", "http://proxy.example")),
        ("https://proxy.example:8443/sub/", "", Mount("/sub", "https://proxy.example:8443/sub")),
        ("http://[::1]:80/sub", "", Mount("/sub", "http://[::1]:80/sub")),
        # A proxy that removes the path.
        ("https://proxy.example/sub", "/", Mount("", "https://proxy.example/sub")),
        ("https://proxy.example/sub", "other", Mount("/other", "https://proxy.example/sub")),
        ("/sub/", "", Mount("/sub", "/sub")),
    ],
)
def test_mount(external: str, prefix: str, expected: Mount) -> None:
    """The prefix is the path of the external URL, unless one is given."""
    assert mount(external, prefix) == expected


@pytest.mark.parametrize(
    "external",
    [
        *("proxy.example/sub", "ftp://proxy.example", "http://", "http:///sub", "https://h/sub?x"),
        *("https://h/sub#x", "https://u:secret@h/", "http://h:port/", "http://[::1/", "'http://h'"),
        *(
            "http://h/a b",
            "http://h/a%20b",
            "http://h/\u00e9",
            "http://h/..",
            "//h/sub",
            "http://h\r\nX: y",
        ),
        *("http://h/sub\n", "http://h:99999/"),
    ],
)
def test_bad_external_url(external: str) -> None:
    """A bad external URL gives an error that says what was expected, and shows no password."""
    with pytest.raises(ValueError, match=r"^--web.external-url: expected ") as caught:
        mount(external, "")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["/a b", "/a?b", "a#b", "/%41", "/a//b", "/..", "/a/./b", "/\n"])
def test_bad_route_prefix(prefix: str) -> None:
    """A prefix that no client asks for is an error."""
    with pytest.raises(ValueError, match=r"^--web.route-prefix: expected ") as caught:
        mount("", prefix)
    assert repr(prefix) in str(caught.value)


@pytest.mark.parametrize(
    "flag", ["--web.telemetry-path=metrics", "--web.external-url=host/sub", "--web.route-prefix=/%"]
)
def test_at_the_start(flag: str) -> None:
    """The service does not start with a bad path, and prints one line that names the option."""
    done = subprocess.run([*EXPORTER, flag], capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    name = re.escape(flag.partition("=")[0])
    assert re.fullmatch(rf"dtrace-exporter: {name}: expected .*\n", done.stderr)
