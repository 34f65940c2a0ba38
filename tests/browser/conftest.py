# SPDX-License-Identifier: Apache-2.0
"""One browser for all pages."""

import pytest
from chromium import Browser


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp('profile'))
    yield made
    made.close()
