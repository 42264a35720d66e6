"""The report as claims: one sentence, one test.  `pytest --pyargs refimpl.spec_tests` runs them."""
