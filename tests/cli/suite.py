"""Runs the unittest cases of a module and ends with the line that tests/run adds up."""
import sys
import unittest


class Counted(unittest.TextTestResult):
    """Counts each test method once, however many subtests of it fail."""
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.broken = set()

    def _mark(self, test):
        self.broken.add(getattr(test, "test_case", test).id())

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._mark(test)

    def addError(self, test, err):
        super().addError(test, err)
        self._mark(test)

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._mark(test)


def main(name, module="__main__"):
    tests = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[module])
    if len(sys.argv) > 1:                 # only the tests whose names contain an argument
        tests = unittest.TestSuite(t for case in tests for t in case if any(a in t.id() for a in sys.argv[1:]))
    runner = unittest.TextTestRunner(stream=sys.stderr, verbosity=1, resultclass=Counted)
    result = runner.run(tests)
    failed = len(result.broken)
    print(f"{name}: {result.testsRun - failed} passed, {failed} failed", flush=True)
    sys.exit(1 if failed or result.testsRun == 0 else 0)
