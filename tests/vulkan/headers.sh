#!/usr/bin/env bash
# Vulkan headers that are new enough for ggml, below the folder given: this system's own if they
# are, else those of Debian 13 from the mirror that apt is configured with. Installs nothing.
set -euo pipefail
target=$1
newest=$(sed -n 's/^#define VK_HEADER_VERSION //p' /usr/include/vulkan/vulkan_core.h 2>/dev/null || true)
mkdir -p "$target"
if [ "${newest:-0}" -ge 272 ]; then
    ln -sfn /usr/include "$target/include"
    exit
fi
mirror=$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" "Codename: $(. /etc/os-release && echo "$VERSION_CODENAME")" | sort -u | head -n 1)
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >"$apt/sources.list"
options=(
    -qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
)
apt-get "${options[@]}" update
(cd "$apt" && apt-get "${options[@]}" download libvulkan-dev)
dpkg-deb --extract "$apt"/libvulkan-dev_*.deb "$apt/unpacked"
rm -rf "$target/include"
mv "$apt/unpacked/usr/include" "$target/include"
