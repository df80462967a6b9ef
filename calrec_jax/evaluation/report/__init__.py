"""One HTML file that shows evaluations: numbers, curves, lists, examples, rules, origin."""
