# SPDX-License-Identifier: Apache-2.0
"""Self-supervised methods, their health and their measures."""
