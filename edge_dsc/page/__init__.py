"""A latency report or comparison as one self-contained HTML page: text, tables, and plots as inline SVG."""
