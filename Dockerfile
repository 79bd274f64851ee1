# CPU image: docker build -t minimind . && docker run --rm -it --user "$(id -u)" -v "$PWD/out:/data/out" minimind demo
# For an NVIDIA GPU see Dockerfile.cuda.
FROM python:3.12-slim

# g++ compiles the CPU kernels at first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY minimind ./minimind
COPY recipes ./recipes
# PyTorch's own index has the CPU build; PyPI's default build includes gigabytes of CUDA libraries.
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
    -c constraints.txt '.[web]'

# Not root, so that files in mounted folders belong to a user. --user "$(id -u)" makes it yours.
RUN useradd --create-home --uid 1000 minimind && mkdir /data && chmod 1777 /data
USER minimind
WORKDIR /data
ENV MINIMIND_CACHE=/data/.cache
EXPOSE 8000
ENTRYPOINT ["minimind"]
CMD ["--help"]
