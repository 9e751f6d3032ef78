"""The tests of the project in `project/` are run by the tests here, in a copy of it."""

collect_ignore = ["project"]
