#!/usr/bin/env bash
# Vulkan for these tests, below the folder given: include/, headers that are new enough for ggml, and
# lvp_icd.json, which names Mesa's software driver. Both are this system's own where they are recent. On
# Debian 12 the headers are Debian 13's and the driver is that of its backports: its own damages the
# process's heap while it compiles shaders. From the mirror that apt is configured with; installs nothing.
set -euo pipefail
target=$1
newest=$(sed -n 's/^#define VK_HEADER_VERSION //p' /usr/include/vulkan/vulkan_core.h 2>/dev/null || true)
mkdir -p "$target"
if [ "${newest:-0}" -ge 272 ]; then
    ln -sfn /usr/include "$target/include"
    ln -sfn "$(ls /usr/share/vulkan/icd.d/lvp_icd*.json | head -n 1)" "$target/lvp_icd.json"
    exit
fi
if [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" != bookworm ]; then
    echo "Vulkan headers from 1.3.272 on and Mesa's software driver are needed (Debian: libvulkan-dev mesa-vulkan-drivers)" >&2
    exit 1
fi
mirror=$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" "Codename: bookworm" | sort -u | head -n 1)
apt=$(mktemp -d)
trap 'rm -rf "$apt"' EXIT
mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
for suite in trixie bookworm-backports; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main"
done >"$apt/sources.list"
options=(
    -qq -o "Dir::Etc::sourcelist=$apt/sources.list" -o Dir::Etc::sourceparts=-
    -o "Dir::State::lists=$apt/lists" -o "Dir::Cache=$apt/cache" -o APT::Sandbox::User=root
)
apt-get "${options[@]}" update
(cd "$apt" && apt-get "${options[@]}" download libvulkan-dev/trixie mesa-vulkan-drivers/bookworm-backports)
for package in "$apt"/*.deb; do dpkg-deb --extract "$package" "$apt/unpacked"; done
rm -rf "$target/include"
mv "$apt/unpacked/usr/include" "$target/include"
mv "$apt"/unpacked/usr/lib/*/libvulkan_lvp.so "$target/"
sed "s|\"libvulkan_lvp.so\"|\"./libvulkan_lvp.so\"|" "$apt"/unpacked/usr/share/vulkan/icd.d/lvp_icd*.json >"$target/lvp_icd.json"
