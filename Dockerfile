# CPU image: docker build -t minimind . && docker run --rm -it -v "$PWD/out:/data/out" minimind demo
# For an NVIDIA GPU see Dockerfile.cuda.
FROM python:3.12-slim

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY minimind ./minimind
COPY recipes ./recipes
# PyTorch's own index has the CPU build; PyPI's default build includes gigabytes of CUDA libraries.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    -c constraints.txt '.[web]'

# Not root, so that files in mounted folders belong to a user. Override with --user "$(id -u)".
RUN useradd --create-home --uid 1000 minimind && mkdir /data && chown minimind /data
USER minimind
WORKDIR /data
ENV MINIMIND_CACHE=/data/.cache
EXPOSE 8000 8501
ENTRYPOINT ["minimind"]
CMD ["--help"]
