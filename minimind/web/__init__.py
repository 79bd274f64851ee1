"""The chat page (Streamlit): a client of any OpenAI-compatible service. Imports no torch."""
