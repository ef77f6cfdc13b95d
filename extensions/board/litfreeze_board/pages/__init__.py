"""The pages: new.py (`/`), runs.py (`/runs`), run.py (`/runs/{id}`) and chat.py (`/chat`), each with an `add(board)`.

Pieces of new.py, which know nothing of it but what they are given to call: fields.py (the options), layers.py (the
strip, with rate.py) and suggest.py (rankings) fill in the draft; planned.py shows its plan. Of all pages: frame.py,
charts.py (curves), browse.py (folders and files)."""
