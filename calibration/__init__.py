"""Makes smaller graphs from full-precision ones and reports what that costs. Imports nothing here."""
