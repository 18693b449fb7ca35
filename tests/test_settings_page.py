"""docs/settings.md is what the trainers have."""

from tools import settings_page


def test_the_page_is_fresh():
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), "run python -m tools.settings_page"
