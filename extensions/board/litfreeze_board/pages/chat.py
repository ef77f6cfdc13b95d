def add(board):
    pass
