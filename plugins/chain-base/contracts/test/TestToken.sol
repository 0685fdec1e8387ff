// SPDX-License-Identifier: MIT OR Apache-2.0
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";

/// @notice An ordinary token of 6 decimals for development chains.
contract TestToken is ERC20 {
    constructor() ERC20("Test Dollar", "TUSD") {
        _mint(msg.sender, 1_000_000 * 10 ** 6);
    }

    function decimals() public pure override returns (uint8) {
        return 6;
    }

    /// @notice Mints to the caller, so that any test account can pay.
    function mint(uint256 amount) external {
        _mint(msg.sender, amount);
    }
}
