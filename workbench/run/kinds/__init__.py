"""Planning, checking and applying of steps, with one file per kind of step."""
