"""Suites of tasks: listed, shown, checked, created from a file of items, and exported as local files. At most 61 names."""

from workbench.ground.parts import Part

PART = Part(
    commands={"suite": "suites.commands.app", "scores export": "suites.commands.export"},
    documents={
        "suite ls": ["suites.check.SuiteRow"],
        "suite show": "suites.check.ShownSuite",
        "suite check": "suites.check.SuiteReport",
        "suite new": "suites.new.CreatedSuite",
    },
)
