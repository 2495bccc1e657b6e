# SPDX-License-Identifier: Apache-2.0
"""Build, train and export each kind of detector, for ``python -m ovd.train``."""
