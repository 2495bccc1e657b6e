# SPDX-License-Identifier: Apache-2.0
"""What ``python -m ovd.train`` builds for each kind of detector."""
