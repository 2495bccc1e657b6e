# SPDX-License-Identifier: Apache-2.0
"""A small one-stage network that boxes things without naming them: the proposals of photographs."""
