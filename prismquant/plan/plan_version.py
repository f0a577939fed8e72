"""Version of the form in which plan.json is written."""

PLAN_VERSION = 3
