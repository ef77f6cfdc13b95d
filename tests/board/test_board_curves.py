"""Tables are read while they are written: only whole lines count; a file in another's place is read anew."""

from litfreeze_board.curves import POINTS, Table, end_of, error_of, last_looks, progress

HEAD = "step,train_loss,val_loss,seconds,tokens_per_second\n"


def test_a_half_written_line_waits(tmp_path):
    file = tmp_path / "metrics.csv"
    table = Table(file)
    assert not table.look()
    file.write_text(HEAD + "1,5.5,,0.5,100\n2,5.2", encoding="utf-8")
    assert table.look() and table.curve("train_loss") == [(1.0, 5.5)]
    with file.open("a", encoding="utf-8") as out:
        out.write("5,,1.0,110\n2,,4.0,,\n3,nan,,1.5,110\n")
    assert table.look() and not table.look()
    assert table.curve("train_loss") == [(1.0, 5.5), (2.0, 5.25)] and table.curve("val_loss") == [(2.0, 4.0)]
    far = progress(table, 9)
    assert (far.step, far.tokens_per_second, far.left) == (3, 110.0, 3.0)


def test_after_a_resume_the_table_begins_again(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(HEAD + "1,5,,1,1\n2,4,,1,1\n3,3,,1,1\n", encoding="utf-8")
    table = Table(file)
    table.look()
    (tmp_path / "other").write_text(HEAD + "1,5,,1,1\n2,4,,1,1\n", encoding="utf-8")
    (tmp_path / "other").replace(file)
    table.look()
    assert [row["step"] for row in table.rows] == [1, 2]


def test_long_curves_are_thinned_to_their_ends(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_text(HEAD + "".join(f"{i},{i},,1,1\n" for i in range(5000)), encoding="utf-8")
    table = Table(file)
    table.look()
    curve = table.curve("train_loss")
    assert len(curve) == POINTS and curve[0] == (0, 0) and curve[-1] == (4999, 4999)


def test_blocks_and_logs(tmp_path):
    file = tmp_path / "blocks.csv"
    rows = "1,10,3,0.1,0.1\n1,embed,1,0.1,0.1\n10,10,2,0.1,0.3\n"
    file.write_text("step,part,grad_norm,update_ratio,drift\n" + rows, encoding="utf-8")
    table = Table(file)
    table.look()
    looks = last_looks(table)
    assert looks["10"]["drift"] == 0.3 and looks["embed"]["step"] == 1
    log = tmp_path / "log.txt"
    assert end_of(log) == ""
    log.write_bytes(b"begin\n" + b"x" * 300_000 + b"\nstep 1\nerror: no room\nmake some\n")
    assert end_of(log) == "step 1\nerror: no room\nmake some\n"
    assert error_of(end_of(log)) == "no room make some" and error_of("fine") == ""
