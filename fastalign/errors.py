"""The one kind of error that is told in one line."""


class UserError(ValueError):
    """Something the user can mend. The command line prints its message, one line, no traceback.

    Everything else that is raised is a fault of the program and keeps its traceback.
    """
