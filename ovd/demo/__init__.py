# SPDX-License-Identifier: Apache-2.0
"""The web page: type class names, see boxes."""
