# SPDX-License-Identifier: Apache-2.0
"""Offline: sound to aligned, tokenized records on disk. Nothing here runs while a model trains."""
