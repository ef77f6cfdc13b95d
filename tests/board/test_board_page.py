"""The page in a real Chromium: choose, plan, start, watch, close, come back, stop, merge, ask; wide and narrow."""

import re
import shutil
import signal
from collections.abc import Iterator

import pytest
from litfreeze_board import runs
from served_board import Served, wait_for

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium: apt-get install chromium", allow_module_level=True)

COMMAND = "section:has(h2:text-is('Command')) .lf-code"


@pytest.fixture(scope="module")
def board(served) -> Served:
    return served()


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        # Chromium's own sandbox needs rights that a container's root does not have
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, board) -> Iterator["playwright.Page"]:
    """A page that may talk to the board alone, and have nothing to complain of."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(30_000)
    elsewhere, wrong = [], []
    page.on("request", lambda r: None if r.url.startswith((board.url, "data:", "blob:")) else elsewhere.append(r.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert elsewhere == [] and wrong == []


def opened(page, board, path="/"):
    page.goto(board.url + path)
    if path == "/":
        page.wait_for_selector("[data-part='11']")
        page.get_by_role("button", name="Begin again").click()
        wait_for(lambda: pressed(page) == ["10", "11"])


def pressed(page) -> list[str]:
    return page.eval_on_selector_all(".lf-cell[aria-pressed=true]", "cells => cells.map(c => c.dataset.part)")


def words(page) -> str:
    return page.input_value(".lf-text input")


def typed(page, text):
    page.fill(".lf-text input", "")
    page.locator(".lf-text input").press_sequentially(text)  # as fast as it goes


def settled(page):
    """The plan is that of what stands there."""
    page.wait_for_function("() => !document.body.innerText.includes('Counting …')")


def option(page, name, text):
    page.get_by_label(name, exact=True).fill(text)


def cell(page, part):
    return page.locator(f"[data-part='{part}']")


def state(page) -> str:
    return page.inner_text(".lf-state")


def test_strip_and_text_are_one_and_nothing_is_lost(page, board):
    opened(page, board)
    for part in ("0", "1", "2", "3", "4", "5", "1", "3", "0"):
        cell(page, part).click()
    wait_for(lambda: words(page) == "2,4,5,10,11")
    assert pressed(page) == ["2", "4", "5", "10", "11"]
    typed(page, "10,11,-4:")
    wait_for(lambda: pressed(page) == ["8", "9", "10", "11"])
    assert words(page) == "10,11,-4:"
    typed(page, "0, 1 , 20%-40%")  # blanks are the person's
    cell(page, "11").click()  # at once, behind the last key
    wait_for(lambda: words(page) == "0-4,11")
    assert pressed(page) == ["0", "1", "2", "3", "4", "11"]
    cell(page, "10").focus()
    for key in ("Space", "ArrowLeft", "Enter"):
        page.keyboard.press(key)
    wait_for(lambda: words(page) == "0-4,9-11")


def test_dragging_chooses_a_range(page, board):
    opened(page, board)
    cell(page, "2").scroll_into_view_if_needed()
    first, last = cell(page, "2").bounding_box(), cell(page, "6").bounding_box()
    page.mouse.move(first["x"] + 9, first["y"] + 9)
    page.mouse.down()
    page.mouse.move(last["x"] + 9, last["y"] + 9, steps=3)
    assert pressed(page) == ["2", "3", "4", "5", "6", "10", "11"]  # already while it lasts
    page.mouse.up()
    wait_for(lambda: words(page) == "2-6,10,11")


def test_the_plan_follows_and_the_command_is_whole(page, board):
    opened(page, board)
    cell(page, "embed").click()
    option(page, "train.lr", "1e-3")
    option(page, "train.max_steps", "7")
    page.wait_for_selector("text=7 steps")
    settled(page)
    assert re.fullmatch(
        r"litfreeze finetune full --out_dir out/finetune/full(-\d+)? --trainable_layers -2: --trainable_extra embed "
        r"--train.lr 1e-3 --train.max_steps 7",
        page.inner_text(COMMAND),
    )
    assert "565,760 of 2,411,648" in page.inner_text(".lf-tiles")
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save YAML").click()
    recipe = saved.value.path().read_text(encoding="utf-8")
    assert recipe == "trainable_layers: '-2:'\ntrainable_extra: embed\ntrain:\n  lr: 0.001\n  max_steps: 7\n"
    page.get_by_role("button", name="Begin again").click()
    wait_for(lambda: pressed(page) == ["10", "11"])
    files = {"name": "recipe.yaml", "mimeType": "text/yaml", "buffer": b"trainable_layers: [0, 1]\nlora_r: 4\n"}
    page.locator("input[type=file]").set_input_files(files)
    wait_for(lambda: page.inner_text(COMMAND).startswith("litfreeze finetune lora "))  # which alone has lora_r
    wait_for(lambda: pressed(page) == ["0", "1"] and "--lora_r 4" in page.inner_text(COMMAND))
    settled(page)


def test_refusals_stand_beside_their_field(page, board):
    opened(page, board)
    typed(page, "10,99")
    told = "Layers '99': this model has 12 blocks, ids 0 to 11 (or -12 to -1)."
    wait_for(lambda: page.inner_text("#lf-layers-told") == told)
    typed(page, "10")
    for name, text, refusal in (
        ("train.lr", "fast", "train.lr: 'fast' is not a number."),
        ("layer_lr", "3:1e-4", "--layer_lr: block 3 has a rate and does not train; what trains: 10."),
        ("data", "../elsewhere", "--data.path: ../elsewhere leads outside of this board's root"),
    ):
        option(page, name, text)
        field = page.locator("label.q-field", has=page.get_by_label(name, exact=True))
        wait_for(lambda field=field, refusal=refusal: refusal in field.inner_text())
        page.get_by_role("button", name="Start").click()
        settled(page)
        assert page.url == board.url + "/"
        option(page, name, "")


def test_rates_ranks_and_a_timeline(page, board):
    opened(page, board)
    page.locator("[data-rate='10']").click()
    page.get_by_label("rate", exact=True).fill("1e-4")
    page.get_by_role("button", name="Set").click()
    wait_for(lambda: page.get_by_label("layer_lr").input_value() == "10:0.0001")
    wait_for(lambda: page.inner_text("[data-rate='10']") == "0.0001")
    option(page, "layer_lr", "")
    page.get_by_role("button", name="Rank", exact=True).click()
    wait_for(lambda: page.locator(".lf-best").count() == 3)
    page.get_by_role("button", name="Choose them").click()
    best = page.eval_on_selector_all(".lf-best", "cells => cells.map(c => c.dataset.part)")
    wait_for(lambda: pressed(page) == best)
    typed(page, "rank:spectrum:3")
    settled(page)
    wait_for(lambda: pressed(page) == best)
    page.fill(".lf-text input", "")
    option(page, "unfreeze", "gradual:2")
    page.wait_for_selector(".lf-timeline")
    wait_for(lambda: pressed(page) == ["10", "11"])


def test_a_run_and_what_it_leaves(page, browser, board):
    opened(page, board)
    cell(page, "9").click()
    option(page, "train.max_steps", "3000")
    option(page, "train.save_interval", "40")
    wait_for(lambda: "--train.save_interval 40" in page.inner_text(COMMAND))
    page.get_by_role("button", name="Start").click()
    page.wait_for_url("**/runs/0*")
    out_dir = page.inner_text("h1")

    def points(page):
        """Of the curve that is drawn."""
        number = page.locator(".lf-chart").get_attribute("id")[1:]
        return page.evaluate(f"() => getElement({number})?.chart?.getOption()?.series?.[0]?.data?.length ?? 0")

    some = wait_for(lambda: points(page))
    wait_for(lambda: points(page) > some + 3)
    assert state(page) == "running" and "tokens/s" in page.inner_text(".lf-facts")
    address = page.url
    page.goto("about:blank")  # the page goes
    board.kill(signal.SIGKILL)  # and the server
    board.start()

    page.goto(board.url + "/runs")
    wait_for(lambda: "running" in page.inner_text("tbody"))
    assert out_dir in page.inner_text("tbody")
    page.locator("tbody .q-checkbox").first.click()
    wait_for(lambda: points(page) > 3)
    page.goto(address)
    wait_for(lambda: points(page) > some)
    wait_for(lambda: page.locator(".lf-look").count() == 36)
    page.get_by_role("button", name="Stop").click()
    wait_for(lambda: state(page) == "stopped")
    assert "Go on with: litfreeze finetune full --resume" in page.inner_text(".lf-log")
    assert page.get_by_role("button", name="Resume").is_visible()

    page.get_by_role("button", name="Merge").first.click()
    wait_for(lambda: re.search("merge-.*: done", page.inner_text("main")))
    assert any((board.root / out_dir).glob("*-whole/litfreeze.safetensors"))
    page.get_by_role("button", name="Diff").first.click()
    wait_for(lambda: re.search("diff-.*: done", page.inner_text("main")))
    page.wait_for_function("() => document.querySelector('.q-img img')?.naturalWidth > 100")
    page.get_by_role("button", name="Chat").first.click()
    page.wait_for_url("**/chat?run=0*")
    page.get_by_label("Ask both").fill("book a table for five people")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop", exact=True).wait_for()
    answers = page.locator(".lf-said:not(.lf-said-user)")
    page.get_by_role("button", name="Ask", exact=True).wait_for()  # is back when both have ended
    base, tuned = answers.all_inner_texts()
    assert base and tuned and base != tuned


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_every_page_fits(browser, board, tmp_path, width, scheme):
    """Pictures of all pages stay in pytest's folder, to be looked at."""
    words = ["finetune", "full", "--trainable_layers", "10", "--train.max_steps", "2", "--out_dir", f"out/short{width}"]
    run = runs.start(board.root, words, f"out/short{width}", 2, "10", 12)
    wait_for(lambda: run.state == "done")
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    for path in ("/", "/runs", f"/runs/{run.id}", "/chat"):
        page.goto(board.url + path)
        page.wait_for_selector("h2")
        page.wait_for_timeout(500)
        page.screenshot(path=tmp_path / f"{path.replace('/', '_')}{width}{scheme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(20, 24, 27)") == (scheme == "dark")
    page.close()
