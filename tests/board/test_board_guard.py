"""Who may ask: this machine's own pages, and with a token only those who bring it, on WebSockets too."""

import http.client
import subprocess
import sys

import pytest

TOKEN = "a-token_of-8-or-more"
UPGRADE = {
    "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip
SOCKET = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"


def ask(board, path="/", **headers):
    """Status, headers and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", board.port, timeout=10)
    host = headers.pop("Host", f"127.0.0.1:{board.port}")
    connection.request("GET", path, headers={"Host": host, **headers})
    answer = connection.getresponse()
    body = b"" if answer.status == 101 else answer.read()
    connection.close()
    return answer.status, answer.headers, body.decode()


@pytest.fixture(scope="module")
def open_board(served):
    return served()


@pytest.fixture(scope="module")
def closed_board(served):
    return served("--token", TOKEN)


def test_its_own_pages(open_board):
    status, headers, body = ask(open_board)
    assert status == 200 and "litfreeze" in body
    assert headers["X-Frame-Options"] == "DENY" and "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    own = f"http://127.0.0.1:{open_board.port}"
    assert ask(open_board, Origin=own)[0] == 200
    assert ask(open_board, SOCKET, Origin=own, **UPGRADE)[0] == 101
    tunnel = "localhost:9999"  # ssh -L 9999:localhost:8765
    assert ask(open_board, Host=tunnel, Origin=f"http://{tunnel}")[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:1", "null", "http://localhost", "x", "http://[bad"]
)
@pytest.mark.parametrize("path", ["/", SOCKET])
def test_other_sites_are_refused(open_board, origin, path):
    more = UPGRADE if path == SOCKET else {}
    assert ask(open_board, path, Origin=origin, **more)[0] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "169.254.0.1", "[x"]
)
def test_names_that_lead_here_are_refused(open_board, host):
    assert ask(open_board, Host=host)[0] in (400, 403)
    assert ask(open_board, SOCKET, Host=host, **UPGRADE)[0] in (400, 403)


@pytest.mark.parametrize("path", ["/", "/runs", "/chat", "/_nicegui_ws/socket.io/?EIO=4&transport=polling", "/nowhere"])
def test_without_the_token_nothing_is_told(closed_board, path):
    for more in ({}, {"Cookie": f"litfreeze-board-{closed_board.port}=wrong"}, {"Cookie": '=;;="', "X": "y"}):
        status, _, body = ask(closed_board, path, **more)
        assert status == 401 and "token" in body and TOKEN not in body


def test_without_the_token_no_websocket(closed_board):
    assert ask(closed_board, SOCKET, **UPGRADE)[0] == 403
    assert ask(closed_board, f"{SOCKET}&token={TOKEN}", **UPGRADE)[0] == 403  # a page brings the cookie


def test_the_token_becomes_a_cookie(closed_board):
    assert ask(closed_board, "/runs?token=wrong-token")[0] == 401
    status, headers, _ = ask(closed_board, f"/runs?token={TOKEN}&x=1")
    assert status == 303 and headers["Location"] == "/runs?x=1"
    cookie = headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
    brought = {"Cookie": cookie.partition(";")[0]}
    assert ask(closed_board, "/runs", **brought)[0] == 200
    assert ask(closed_board, SOCKET, **brought, **UPGRADE)[0] == 101
    assert ask(closed_board, SOCKET, Origin="https://evil.example", **brought, **UPGRADE)[0] == 403


def test_a_picture_outside_of_a_run_is_not_served(open_board):
    for path in ("/runs/0001/x.png", "/runs/..%2f..%2f/x.png", "/runs/0001/..%2f..%2fsecret.png", "/runs/abc"):
        assert ask(open_board, path)[0] in (404, 500)


def command(*words, block_nicegui=False):
    hide = "sys.modules['nicegui'] = None; " if block_nicegui else ""
    code = f"import sys; {hide}from litfreeze.__main__ import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False)


def test_without_the_extra_it_says_what_to_install(installed):
    ended = command("board", block_nicegui=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: The board needs nicegui: pip install 'litfreeze[board]'.\n"


def test_the_command_line_lists_it(installed):
    assert "board" in command("--help").stdout
    assert "--token" in command("board", "--help").stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "99999"], "--port 99999"),
        (["--root", "nowhere"], "--root nowhere"),
        (["--token", "short"], "--token takes"),
        (["--token", "with blanks in it"], "--token takes"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
    ],
)
def test_what_it_refuses(served, words, told):
    ended = command("board", *words)
    assert ended.returncode == 2 and told in ended.stderr and ended.stderr.startswith("error: ")


def test_a_port_that_is_taken(open_board):
    ended = command("board", "--port", str(open_board.port))
    assert ended.returncode == 2 and f"--port {open_board.port}" in ended.stderr
