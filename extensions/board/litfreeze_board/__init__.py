"""The board: a local web page for fine-tuning chosen layers. It runs litfreeze's own commands.

Without a page: options.py (a command's options as fields, words and YAML), draft.py (what is filled in of them),
choice.py (words ↔ parts that train), plan.py (words → numbers), figures.py (these as HTML), runs.py (runs on disk),
curves.py (their tables), results.py (their checkpoints), places.py (paths inside of a root), answer.py (a chat's
answers), helper.py (the process that does what is heavy), guard.py (who may ask). With one: board.py (what pages
share), strip.py, server.py, pages/."""
